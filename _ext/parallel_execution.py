"""Execute notebooks side by side, before Sphinx reads them one after another.

MyST-NB executes a notebook when it reads its page, and it reads one page at a time. Here
every notebook whose outputs are not in its cache yet is executed beforehand, one on each
core, and put into that cache. A notebook that fails is left alone: MyST-NB then runs it
again and reports the error in its own way.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.display import status_iterator


def bridged(app: Sphinx, docname: str) -> nbformat.NotebookNode:
    "The notebook as MyST-NB will see it, after the handlers of source-read."
    source = [Path(app.env.doc2path(docname)).read_text(encoding="utf-8")]
    app.events.emit("source-read", docname, source)
    return nbformat.reads(source[0], as_version=4)


def execute(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    "Fill the cache for those of `docnames` that are notebooks."
    settings = env.mystnb_config
    if settings.execution_mode != "cache":
        return
    cache = get_cache(settings.execution_cache_path or ".jupyter_cache")
    todo = {}
    for docname in docnames:
        path = app.env.doc2path(docname)
        if path.endswith(".ipynb"):
            notebook = bridged(app, docname)
            try:
                cache.match_cache_notebook(notebook)
            except KeyError:
                todo[path] = notebook

    def run(path: str):
        # The kernel is a process of its own; the thread only waits for it.
        timeout, folder = settings.execution_timeout, str(Path(path).parent)
        return path, single_nb_execution(todo[path], folder, timeout, False)

    # The longest first, so that none of them is left to run alone at the end.
    longest = sorted(todo, key=lambda path: -len(str(todo[path])))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(run, longest)
        for path, result in status_iterator(done, "executing notebooks... ",
                                            length=len(todo),
                                            stringify_func=lambda x: Path(x[0]).stem):
            if result.err is None:
                data = {"execution_seconds": result.time}
                bundle = CacheBundleIn(result.nb, path, data=data)
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def setup(app: Sphinx) -> dict:
    app.connect("env-before-read-docs", execute)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
