// Shows what a link of this site leads to, beside the link: a definition, an equation, a
// theorem, a figure, an entry. It opens under the pointer and on focus by the keyboard, stays
// while the pointer is in it, and closes on Escape. A finger opens a definition; its second
// tap, and every tap on another link, follows the link.
(() => {
  const LINKS = '.bd-article a[href*="#"]:not(.headerlink, .toc-backref)';
  const WAIT = 250;  // ms, of the pointer
  const pages = new Map();
  let box, owner, timer;

  const page = (url) => {
    if (!pages.has(url)) {
      const parse = (text) => new DOMParser().parseFromString(text, 'text/html');
      const load = fetch(url).then((answer) => answer.ok ? answer.text() : '');
      pages.set(url, load.then(parse).catch(() => parse('')));
    }
    return pages.get(url);
  };

  const parts = (target) => {  // what stands for the place that a link leads to
    if (!target) return [];
    if (target.matches('dt')) {
      const meaning = target.nextElementSibling;
      return target.closest('dl.glossary') ? [...meaning.children] : [target, meaning.children[0]];
    }
    if (target.matches('section')) return [target.children[0], target.querySelector(':scope > p')];
    if (target.matches('span') && !target.textContent) return [target.nextElementSibling];
    return target.matches('h1, article, main') ? [] : [target];
  };

  const copy = (node, url) => {
    const made = document.importNode(node, true);
    made.querySelectorAll('.headerlink, script, button').forEach((x) => x.remove());
    [made, ...made.querySelectorAll('[id]')].forEach((x) => x.removeAttribute('id'));
    for (const [tag, name] of [['img', 'src'], ['a', 'href']]) {
      made.querySelectorAll(tag).forEach((x) => {
        x.setAttribute(name, new URL(x.getAttribute(name), url).href);
        x.tabIndex = -1;
      });
    }
    return made;
  };

  const close = () => {
    clearTimeout(timer);
    if (box) {
      window.MathJax?.typesetClear?.([box]);
      box.remove();
      owner.removeAttribute('aria-describedby');
    }
    box = owner = null;  // also of what is still on its way
  };

  const place = () => {
    const frame = box.offsetParent.getBoundingClientRect();
    const text = owner.closest('article').getBoundingClientRect();
    const line = owner.getClientRects()[0];
    const left = Math.max(text.left, Math.min(line.left, text.right - box.offsetWidth - 8));
    const above = line.bottom + box.offsetHeight + 8 > innerHeight && line.top > innerHeight / 2;
    box.style.left = `${left - frame.left}px`;
    box.style.top = `${(above ? line.top - 6 : line.bottom + 6) - frame.top}px`;
    box.classList.toggle('above', above);
  };

  const open = async (link) => {
    if (owner === link) return;
    close();
    const url = new URL(link.href);
    if (url.origin !== location.origin) return;
    owner = link;
    const found = await page(url.origin + url.pathname);
    const id = decodeURIComponent(url.hash.slice(1));
    const shown = parts(found.getElementById(id)).filter(Boolean).map((x) => copy(x, url));
    const unread = shown.some((x) => x.matches('.math') || x.querySelector('.math'));
    if (owner !== link || box) return;
    if (!shown.length || (unread && !window.MathJax)) { owner = null; return; }
    box = document.createElement('div');
    box.className = 'po-preview';
    box.id = 'po-preview';
    box.setAttribute('role', 'tooltip');
    box.append(...shown);
    link.closest('article').append(box);
    link.setAttribute('aria-describedby', box.id);
    place();
    await window.MathJax?.typesetPromise?.([box]);
    if (box && owner === link) place();
  };

  const later = (what, wait) => { clearTimeout(timer); timer = setTimeout(what, wait); };
  const linkOf = (event) => event.target.closest?.(LINKS);
  const inBox = (event) => box?.contains(event.target);

  document.addEventListener('pointerover', (event) => {
    if (event.pointerType !== 'mouse') return;
    const link = inBox(event) ? null : linkOf(event);
    if (link) later(() => open(link), WAIT);
    else if (inBox(event) || document.activeElement === owner) clearTimeout(timer);
    else later(close, WAIT);
  });
  document.addEventListener('focusin', (event) => {
    const link = linkOf(event);
    if (link?.matches(':focus-visible')) open(link);
    else if (!inBox(event)) close();
  });
  document.addEventListener('keydown', (event) => { if (event.key === 'Escape') close(); });
  document.addEventListener('pointerdown', (event) => {
    if (!inBox(event) && linkOf(event) !== owner) close();
  });
  document.addEventListener('click', (event) => {
    const link = linkOf(event);
    const opens = event.pointerType === 'touch' && link?.matches('.po-term') && owner !== link;
    if (opens) {
      event.preventDefault();
      open(link);
    } else if (link && !inBox(event)) close();
  });
})();
