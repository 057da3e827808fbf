// Draws the demos of a page. Stands behind Vega in one file (demo_pages.py), which gives `vegaEmbed`.
const draw = async node => {
  const chart = node.querySelector(".po-demo-chart"), reading = node.querySelector("[role=status]");
  const spec = JSON.parse(node.querySelector("script").textContent);
  delete spec.title;  // the reading, which the page shows as text
  const { view } = await vegaEmbed(chart, spec, {
    actions: false, defaultStyle: false, renderer: "svg", bind: node.querySelector(".po-demo-numbers"),
  });
  const say = text => { reading.textContent = text; };
  view.addSignalListener("reading", (name, text) => say(text));
  say(view.signal("reading"));
  // Axes and legends keep their size, so the panels take what the screen leaves.
  const wanted = view.width();
  const fit = async () => {
    const beside = chart.querySelector("svg").getBoundingClientRect().width - view.width();
    const width = Math.max(120, Math.min(wanted, chart.clientWidth - beside));
    if (Math.abs(width - view.width()) >= 1) await view.width(width).runAsync();
  };
  await fit();
  new ResizeObserver(fit).observe(chart);
  node.dataset.ready = "";
};
// One after another, so that the first is ready first.
const drawAll = async () => {
  for (const node of document.querySelectorAll(".po-demo")) await draw(node);
};
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", drawAll);
else drawAll();
