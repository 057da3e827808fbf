// A formula that is wider than its place scrolls; the tab key reaches it, arrow keys move it.
(() => {
  const sizes = new ResizeObserver((seen) => seen.forEach(({ target }) => {
    const box = target.matches('div') ? target.querySelector('mjx-container') : target;
    if (!box) return;
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    else box.removeAttribute('tabindex');
  }));
  // What is observed anew is looked at after the next layout, whether its size changes or not.
  const look = (formulas) => formulas.forEach((formula) => {
    sizes.unobserve(formula);
    sizes.observe(formula);
  });
  const contents = new MutationObserver((changes) => {  // it is set when it comes near
    look(new Set(changes.map(({ target }) => target.closest('.math')).filter(Boolean)));
  });

  addEventListener('DOMContentLoaded', () => {
    const article = document.querySelector('.bd-article');
    if (!article) return;  // the page of the search
    const all = () => look(article.querySelectorAll('.math'));
    all();
    contents.observe(article, { childList: true, subtree: true });
    document.fonts.addEventListener('loadingdone', all);
  });
})();
