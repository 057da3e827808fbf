"Package metadata, read from settings.ini so that each fact is written once."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
extras = {
    key.removesuffix("_requirements"): settings[key].split()
    for key in settings
    if key.endswith("_requirements")
}
url = f"https://github.com/{settings['user']}/{settings['repo']}"

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="Apache-2.0",
    keywords=settings["keywords"].split(),
    url=url,
    project_urls={"Book": f"https://{settings['user']}.github.io/{settings['repo']}"},
    packages=["po_book"],
    python_requires=f">={settings['min_python']}",
    entry_points={"console_scripts": ["po-book = po_book.cli:main"]},
    install_requires=settings["requirements"].split(),
    extras_require=extras,
)
