// A printed page is light, its formulas are set, and its proofs and solutions stand open (po_book.css).
const typesetPage = async () => {
  if (window.MathJax?.startup) {
    await MathJax.startup.promise;
    await MathJax.startup.document.lazyTypesetAll();
  }
  document.body.getBoundingClientRect();  // the browser asks for fonts when it lays out
  await document.fonts.ready;
};
// Fonts that come late would be missing on paper, so printing waits for them.
const printNow = window.print.bind(window);
window.print = () => typesetPage().then(printNow);
addEventListener("keydown", event => {
  if ((event.ctrlKey || event.metaKey) && event.key === "p") {
    event.preventDefault();
    window.print();
  }
});
let theme;
addEventListener("beforeprint", () => {
  theme = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
});
addEventListener("afterprint", () => { document.documentElement.dataset.theme = theme; });
