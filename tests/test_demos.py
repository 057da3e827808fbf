"""What a reader's browser computes is what the library computes.

Each chart is compiled and evaluated by Vega in a real browser, from its own formulas.
"""

import itertools
import sys
from functools import cache

import pytest
import torch
from conftest import ROOT
from demo_pages import vega
from playwright.sync_api import sync_playwright
from torch.testing import assert_close

from po_book import charts, demos, lm_demos
from po_book.advantage import gae, n_step_advantage, td_error
from po_book.dapo import informative, soft_overlong_penalty
from po_book.grpo import group_advantages, token_weights
from po_book.kl import exact_kl, kl_estimate
from po_book.natural_gradient import conjugate_gradient, fisher_vector_product
from po_book.ppo import clipped_surrogate, entropy, ppo_loss, ratio, value_loss

pytestmark = pytest.mark.usefixtures("double")

MAKERS = {
    name: maker
    for module in (demos, lm_demos)
    for name, maker in vars(module).items()
    if name.endswith("_demo")
}

SHOW = """async ([name, chart]) => {
  const made = await vegaEmbed(document.createElement('div'), chart, {renderer: 'none'});
  const tables = made.vgSpec.data.map(table => table.name);
  (window.shown ??= {})[name] = {view: made.view, tables};
}"""
MOVE = """async ([name, numbers]) => {
  const {view} = shown[name];
  for (const [number, value] of Object.entries(numbers)) view.signal(number, value);
  await view.runAsync();
}"""
# Of the longest table that has these columns.
READ = """([name, columns]) => {
  const {view, tables} = shown[name];
  const found = tables.map(table => view.data(table) || [])
    .filter(rows => rows.length && columns.every(c => c in rows[0]))
    .sort((a, b) => b.length - a.length)[0];
  return columns.map(c => found.map(row => row[c]));
}"""


class Shown:
    "A chart in a browser."

    def __init__(self, tab, name: str):
        self.tab, self.name = tab, name
        tab.evaluate(SHOW, [name, MAKERS[name]().to_dict()])

    def read(self, *columns: str, **numbers) -> list[torch.Tensor]:
        "Columns of the longest table that has them, after some numbers have been moved."
        self.tab.evaluate(MOVE, [self.name, numbers])
        found = self.tab.evaluate(READ, [self.name, list(columns)])
        return [torch.tensor(c, dtype=torch.float64) for c in found]

    def number(self, name: str):
        return self.tab.evaluate("([n, x]) => shown[n].view.signal(x)", [self.name, name])


@pytest.fixture(scope="module")
def tab(chromium):
    (ROOT / "_build").mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags, timeout=120_000)
        tab = browser.new_page()
        tab.set_default_timeout(120_000)
        tab.add_script_tag(content=f"(() => {{\n{vega(ROOT / '_build')}\n}})();")
        yield tab
        browser.close()


@pytest.fixture(scope="module")
def shown(tab):
    "Charts, each made once; a test moves all numbers that it needs."
    return cache(lambda name: Shown(tab, name))


def close(found, wanted):
    assert_close(found, torch.as_tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=1e-6)


def slope(value, x):
    return torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize("advantage", [-1.7, -0.5, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.28), (0.0, 0.4), (0.5, 0.0)])
def test_the_clip(shown, advantage, low, high):
    chart = shown("clip_demo")
    numbers = {"advantage": advantage, "clip_low": low, "clip_high": high}
    rho, *found = chart.read("rho", "objective", "slope", "unclipped", **numbers)
    # At a bound itself the objective has two slopes.
    kept = ((rho - 1 + low).abs() > 1e-9) & ((rho - 1 - high).abs() > 1e-9)
    rho, value, gradient, unclipped = (x[kept] for x in (rho, *found))
    assert len(rho) > 200
    logp = rho.log().requires_grad_()
    wanted = clipped_surrogate(logp, 0 * rho, torch.full_like(rho, advantage), low, high)
    close(value, wanted.detach())
    close(gradient, slope(wanted, logp))
    close(unclipped, rho * advantage)
    for place in (0.3, 0.95, 1.31):
        there = chart.read("rho", "low", "objective", "slope", ratio=place, **numbers)
        logp = torch.tensor([place]).log().requires_grad_()
        one = clipped_surrogate(logp, torch.zeros(1), torch.tensor([advantage]), low, high)
        close(torch.cat(there), [place, 1 - low, one.item(), slope(one, logp).item()])


@pytest.mark.parametrize(
    "case, place, advantage",
    [
        (1, 1.25, 1), (2, 0.65, -1), (3, 0.5, 1), (4, 0.5, -1), (5, 1.35, 1), (6, 1.35, -1),
        (0, 1.5, 0),
    ],
)  # fmt: skip
def test_the_six_cases(shown, case, place, advantage):
    "Numbered as in the chapter on PPO; in two of them the gradient is zero."
    chart = shown("clip_demo")
    numbers = {"advantage": advantage, "clip_low": 0.4, "clip_high": 0.3, "ratio": place}
    gradient, _ = chart.read("slope", "low", **numbers)
    reading = chart.number("reading")
    assert chart.number("lit") == case
    assert reading.startswith(f"Case {case}: ratio" if case else "Â = 0:")
    assert ("stop" in reading) == (case in (4, 5)) == (gradient.item() == 0 and case != 0)


def flattered(b, gamma, lam):
    "Advantage of the first of 20 steps if the critic overrates what follows; its slopes."
    rewards = torch.zeros(20, 1, requires_grad=True)
    values = torch.full((21, 1), float(b))
    values[0] = 0
    end = torch.zeros(20, 1, dtype=torch.bool)
    end[-1] = True
    first = gae(rewards, values[:-1], values[1:], end, end, gamma, lam)[0]
    return first.item(), slope(first, rewards)[:, 0]


@pytest.mark.parametrize("gamma", [0.0, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.99, 1.0])
def test_gae(shown, gamma, lam):
    chart = shown("gae_demo")
    numbers = {"gamma": gamma, "lam": lam, "error": -1.5, "noise": 0.7}
    errors, mixture = chart.read("error_weight", "step_weight", **numbers)
    bias, weights = flattered(-1.5, gamma, lam)
    close(errors, weights)
    r, v, after = torch.randn(3, 20, 1)
    no, end = torch.zeros(2, 20, 1, dtype=torch.bool)
    end[-1] = True
    each = [n_step_advantage(r, v, after, no, end, gamma, n)[0, 0] for n in range(1, 21)]
    close(mixture @ torch.stack(each), gae(r, v, after, no, end, gamma, lam)[0, 0])
    table = torch.stack(chart.read("x", "bias", "deviation", "size", **numbers), 1)
    assert len(table) == 303  # a row for each curve
    for place, *found in table[::30].tolist():
        bias, weights = flattered(-1.5, gamma, place)
        deviation = 0.7 * weights.norm().item()
        close(torch.tensor(found), [bias, deviation, (bias**2 + deviation**2) ** 0.5])


REWARDS = [
    [1, 0, 0, 1, 0, 0, 1, 0],
    [0.3] * 8,
    [0] * 8,
    [0.4] * 7 + [0.5],
    [0.1, 0.9, 0.3, 0.3, 0.8, 0.2, 0.7, 1.0],
]


@pytest.mark.parametrize("divide, scale", [("deviation", "group"), ("nothing", "none")])
@pytest.mark.parametrize("rewards", REWARDS)
def test_grpo(shown, rewards, divide, scale):
    chart = shown("grpo_demo")
    numbers = {f"r{i + 1}": r for i, r in enumerate(rewards)} | {"divide": divide}
    hows = ["sample", "token", "constant"]
    advantages, length, pull, *weights = (
        x.view(8, 3) for x in chart.read("advantage", "length", "pull", *hows, **numbers)
    )
    group = torch.tensor([rewards], dtype=torch.float64)
    wanted = group_advantages(group, scale)[0]
    close(advantages, wanted[:, None].expand(8, 3))
    mask = torch.arange(64) < length[:, :1]
    for how, found, drawn in zip(hows, weights, pull.T):
        weight = token_weights(mask, how, 64).max(1).values
        close(found, weight[:, None].expand(8, 3))
        close(drawn, wanted * weight)
    dead = not informative(group).item()
    assert chart.number("dead") == dead == chart.number("reading").startswith("DEAD")
    if dead:
        assert (advantages == 0).all()


@pytest.mark.parametrize("max_len, cache", [(160, 40), (100, 79), (80, 1)])
def test_the_overlong_penalty(shown, max_len, cache):
    length, penalty = shown("dapo_demo").read("length", "penalty", max_len=max_len, cache=cache)
    close(penalty, soft_overlong_penalty(length.long(), max_len, cache))


@pytest.mark.parametrize("size", [2, 5])
def test_the_share_of_dead_groups(shown, size):
    p, dead = shown("dapo_demo").read("p", "dead", group=size)
    groups = torch.tensor(list(itertools.product([0.0, 1.0], repeat=size)))
    right = groups.sum(1)
    chance = p[:, None] ** right * (1 - p[:, None]) ** (size - right)
    close(dead, chance[:, ~informative(groups)].sum(1))


@pytest.mark.parametrize("low, high", [(0.2, 0.28), (0.4, 0.1)])
def test_the_room_of_a_token(shown, low, high):
    "At the bounds, and nowhere before them, the clip takes the gradient."
    columns = shown("dapo_demo").read("p", "at most", "at least", clip_low=low, clip_high=high)
    # A row for each curve; without a token of probability 0.
    p, most, least = (x[::3][1:] for x in columns)
    for bound, sign in (most, 1.0), (least, -1.0):
        free = (bound < 1 - 1e-9) if sign > 0 else bound > 0
        for beyond in (False, True):
            logp = (bound[free].log() + sign * (1e-7 if beyond else -1e-7)).requires_grad_()
            sample = torch.full_like(logp, sign).detach()
            value = clipped_surrogate(logp, p[free].log(), sample, low, high)
            assert ((slope(value, logp) == 0) == beyond).all()


@pytest.mark.parametrize("q", [0.05, 0.4, 0.9])
def test_estimates_of_a_divergence(shown, q):
    "Means over both actions, and mean gradients in the logit."
    chart, kinds = shown("kl_demo"), ["k1", "k2", "k3"]
    tables = (chart.read("x", *kinds, what, q=q) for what in ("value", "gradient"))
    # Each place has a row for each estimator.
    (x, *values, height), (_, *gradients, slopes) = ([c[::3] for c in t[:-1]] + [t[-1]] for t in tables)
    assert len(x) == 99
    close(height, torch.stack(values, 1).view(-1))
    close(slopes, torch.stack(gradients, 1).view(-1))
    logit = (x / (1 - x)).log().requires_grad_()
    logits = torch.stack([logit, 0 * logit], -1)
    logp = logits.log_softmax(-1)
    ref = torch.tensor([q, 1 - q]).log().expand_as(logp)
    for kind, value, gradient in zip(kinds, values, gradients):
        mean = (logp.detach().exp() * kl_estimate(logp, ref, kind)).sum(-1)
        close(value, mean.detach())
        close(gradient, torch.autograd.grad(mean.sum(), logit, retain_graph=True)[0])
    exact = exact_kl(logits, ref)
    close(values[0], exact.detach())
    close(gradients[1], slope(exact, logit))


@pytest.mark.parametrize("gamma, lam, move", [(0.9, 0.8, 1), (1, 0, 0), (0.5, 1, 2)])
def test_the_loop_of_ppo(shown, gamma, lam, move):
    chart = shown("ppo_demo")
    height, at, t = chart.read("height", "at", "t", gamma=gamma, lam=lam, move=move, stage=9)
    table = torch.tensor(chart.number("table"), dtype=torch.float64)
    close(height, table[at.long(), t.long()])
    r, v, logit, toward = torch.tensor(demos._EPISODE, dtype=torch.float64).T
    end = torch.tensor([False] * 4 + [True])[:, None]
    steps = r[:, None], v[:, None], v.roll(-1)[:, None], end
    advantages = gae(*steps, end, gamma, lam)[:, 0]

    def both(logit):
        "Log-probability of the action taken, and entropy."
        logits = torch.stack([logit, 0 * logit], -1)
        return logits.log_softmax(-1)[:, 0], entropy(logits)

    (old, _), (new, H) = both(logit), both(logit + move * toward)
    wanted = [
        r, v, td_error(*steps, gamma)[:, 0], advantages, advantages + v, ratio(new, old),
        clipped_surrogate(new, old, advantages), value_loss(v, advantages + v), H,
    ]  # fmt: skip
    close(table[:-1], torch.stack(wanted))
    loss = ppo_loss(new, old, advantages, H, v, advantages + v, entropy_coef=0.01)
    assert chart.number("mean") == pytest.approx(loss.item(), abs=1e-6)
    close(table[-1].mean(), loss)


def test_the_loop_is_read_out(shown):
    chart = shown("ppo_demo")
    for stage, begins in (1, "What the rollout has stored: values"), (4, "Target"):
        chart.read("height", "at", gamma=0.9, lam=0.8, move=1, stage=stage)
        what, now = chart.number("reading").split("\nNow: ")
        table = chart.number("table")[stage]
        assert what.startswith(begins)
        numbers = ", ".join(f"{x:.2f}" for x in table)
        assert now == f"{numbers}; mean {sum(table) / 5:.3f}".replace("-", "−")


@pytest.mark.parametrize("u, v, radius", [(1.8, 1.1, 0.05), (0, 0, 0.2), (-1, 3, 0.01)])
def test_a_trust_region(shown, u, v, radius):
    chart = shown("trust_region_demo")
    x, y, worth, divergence = chart.read(
        "x", "y", "worth", "divergence", u=u, v=v, radius=radius
    )
    start = torch.tensor([u, v], dtype=torch.float64)
    values = torch.tensor([0, 1, 1.5])

    def logits(change):
        return torch.cat([start + change, torch.zeros_like(change[..., :1])], -1)

    middles = torch.stack([x, y], -1) + 0.05
    policies, old = logits(middles), logits(torch.zeros(2))
    close(worth, policies.softmax(-1) @ values)
    close(divergence, exact_kl(old.expand_as(policies), policies))
    change = torch.zeros(2, requires_grad=True)
    gradient = slope(logits(change).softmax(-1) @ values, change)
    product = fisher_vector_product(exact_kl(old, logits(change)), [change])
    natural = conjugate_gradient(product, gradient, tol=1e-30)
    for letter, way in ("g", gradient), ("n", natural):
        step = torch.tensor([chart.number(f"{letter}_step{i}") for i in (1, 2)])
        close(step, way * (2 * radius / (way @ product(way))) ** 0.5)
    n1, n2 = (chart.number(f"n_step{i}") for i in (1, 2))
    assert n1 == pytest.approx(3 * n2)  # whatever the old policy: as 0 and 1 lie below 1.5
    *edge, _ = chart.read("x", "y", "share")
    points = torch.stack(edge, -1)
    assert len(points) == 121
    for point in points[::12]:
        close(point @ product(point) / 2, radius)


READINGS = {
    "clip_demo": "Case 5: ratio above the band, Â > 0: stop.\n"
    "ratio 1.40, objective 1.200, gradient in log π 0.000",
    "grpo_demo": "An informative group: mean 0.375, deviation 0.484.\n"
    "Advantages 1.29, −0.77, −0.77, 1.29, −0.77, −0.77, 1.29, −0.77.",
    "dapo_demo": "a token of 0.1: from 0.0800 to 0.1280\n"
    "dead groups 0.168: for 100 that teach, draw about 120\npenalty of the answer −0.500",
    "kl_demo": "k1: value 0.335, gradient 0.000\nk2: value 0.313, gradient 0.287\n"
    "k3: value 0.335, gradient 0.400",
}


@pytest.mark.parametrize("name", READINGS)
def test_what_a_demo_says_at_first(tab, name):
    "These can be found by hand."
    fresh = Shown(tab, name)
    assert fresh.number("reading") == READINGS[name]


def test_words_with_numbers():
    assert charts.say("it's {x:.2f} or\n{y[1]:d}") == (
        """"it's " + format(x, '.2f') + ' or\\n' + format(y[1], 'd')"""
    )
    assert charts.say("words") == "'words'"


@pytest.mark.parametrize("name", MAKERS)
def test_a_demo_can_be_read_without_seeing_it(shown, name):
    chart = MAKERS[name]().to_dict()
    assert len(chart["description"]) > 40
    bound = [p for p in chart["params"] if "bind" in p]
    assert bound and all(p["bind"]["name"] for p in bound)
    reading = shown(name).number("reading")
    assert len(reading) > 20 and "NaN" not in reading and "undefined" not in reading


def test_a_reading_is_the_title_elsewhere():
    title = demos.clip_demo().to_dict()["title"]
    assert title["text"] == {"expr": "split(reading, '\\n')"}


def test_parts_of_a_chart_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match="value must be in .0, 1., got 2"):
        charts.slider("x", "x", 2, 0, 1)
    with pytest.raises(ValueError, match="count"):
        charts.grid("x", 0, 1, 1)


def test_without_altair_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ImportError, match=r"pip install 'po-book\[demos\]'"):
        demos.clip_demo()
