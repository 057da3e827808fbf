import pytest
from cell_rules import folded

PLOT = "fig, axes = plt.subplots(1, 2)\naxes[0].plot(x)"


@pytest.mark.parametrize(
    "code, what",
    [
        ("import torch\n\nfrom po_book.verify import holds", "the imports"),
        ("import torch\nif TYPE_CHECKING:\n    from a import B", "the imports"),
        ("import torch\nif FAST:\n    from a import B", None),
        ("import torch\ntorch.set_default_dtype(torch.float64)\nbook_style()", "the set-up"),
        ("import torch\nSEED = 3\nrng = np.random.default_rng(SEED)", "the set-up"),
        ("torch.manual_seed(0)", "the set-up"),
        ('holds("one", 1, 1)', "the check"),
        ('for n in 1, 2:\n    refuted("one", n, 0)', "the check"),
        ("from po_book import verify\nverify.exceeds('more', 2, 1)", "the check"),
        ("at_most('less', x, 2)", "the check"),
        ("x = sample()\nbeware('x', x, 0)\nx", "the check"),
        (PLOT, "the code of the figure"),
        ("import matplotlib.pyplot as plt\nplt.plot([1, 2])", "the code of the figure"),
        ("axes.flat[0].set_title('a')", "the code of the figure"),
        ("spread_curves(ax, runs)", "the code of the figure"),
        (PLOT + "\nholds('one', 1, 1)", "the code of the figure"),
        ("x = 1", None),
        ("import torch\nrun = train('ppo')", None),
        ("td_error(r, v)", None),
        ("def holds(a):\n    return a", None),
        ("axes = (0, 1)\nx.sum(axes)", None),
        ("%pip install torch", None),
        ("", None),
    ],
)
def test_what_a_page_folds(code, what):
    assert folded({}, code) == what


def test_an_exported_definition_stays_open():
    assert folded({"export": ""}, "def f(x):\n    plt.plot(x)\n    holds(1)") is None
    assert folded({"exports": ""}, "torch.manual_seed(0)") is None
    assert folded({"export": ""}, "import torch\nfrom math import pi") == "the imports"
    assert folded({"export": ""}, "import torch\nEPS = 1e-8") is None


def test_helpers_are_folded():
    assert folded({"exporti": ""}, "def _f(x):\n    return x") == "the helper"
    assert folded({"exporti": ""}, "import torch") == "the imports"


def test_a_caption_makes_a_figure():
    assert folded({"fig-cap:": "A tree."}, "draw_tree()") == "the code of the figure"


def test_a_hand_decides_against_the_rules():
    assert folded({"code-fold:": "false"}, PLOT) is None
    assert folded({"code-fold:": "true"}, "x = 1") == "the code"
    assert folded({"code-fold:": "true"}, "%time x = 1") == "the code"
    assert folded({"code-fold:": "true"}, PLOT) == "the code of the figure"


@pytest.mark.parametrize("directive", [{"slow": ""}, {"cuda": ""}, {"eval:": "false"}])
def test_code_that_is_not_run_is_all_there_is_to_see(directive):
    assert folded(directive, PLOT) is None
    assert folded({**directive, "code-fold:": "true"}, "x = 1") == "the code"
