"""The site in a real browser, as a reader in light and in dark mode sees it.

Every test waits for what it looks at, and gives a busy machine two minutes for it.
"""

import re

import pytest
from browsers import PATIENCE
from conftest import toc_pages
from playwright.sync_api import expect

# WCAG contrast of each visible piece of text against what lies behind it.
LOW_CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = color => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = c => c.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (let n = node; n; n = n.parentElement) {
      const color = rgba(getComputedStyle(n).backgroundColor);
      if (color[3] > 250) return color;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll('article p, article li, article td, article pre span, article h2, article label')) {
    if (!node.textContent.trim() || node.offsetParent === null) continue;
    const [a, b] = [luminance(rgba(getComputedStyle(node).color)), luminance(behind(node))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.0) found.push(contrast.toFixed(1) + ' ' + node.textContent.slice(0, 60));
  }
  return found;
}"""


# What passes the right edge outside a box that scrolls.
PAST_THE_EDGE = """() => {
  const scrolls = node => !node.matches("article") &&
    (getComputedStyle(node).overflowX !== "visible" || scrolls(node.parentElement));
  const edge = document.documentElement.clientWidth + 1;
  return [...document.querySelectorAll("article *")]
    .filter(node => node.getBoundingClientRect().right > edge && !scrolls(node))
    .map(node => `${node.tagName} ${node.className} ${node.textContent.slice(0, 40)}`);
}"""


# The tab key stops at the formulas that scroll, and at no others.
STOPS_WHERE_IT_SCROLLS = """() => [...document.querySelectorAll("article .math")]
  .map(node => node.matches("div") ? node.querySelector("mjx-container") : node)
  .filter(box => box.checkVisibility())
  .every(box => box.hasAttribute("tabindex") === box.scrollWidth > box.clientWidth + 1)"""


@pytest.mark.parametrize("name", toc_pages())
def test_a_page_renders_without_errors_alone_and_on_a_phone(opened, name):
    tab, errors, elsewhere = opened(name, "light")
    if tab.locator("article .math").count():
        tab.evaluate("typesetPage()")  # formulas far from the screen wait for a reader
        tab.wait_for_function(
            "[...document.querySelectorAll('article .math')]"
            ".every(node => node.querySelector('mjx-math'))"
        )
    assert tab.locator("mjx-merror").count() == 0
    tab.wait_for_function(STOPS_WHERE_IT_SCROLLS)
    assert errors == [] and elsewhere == []
    tab.set_viewport_size({"width": 375, "height": 700})
    tab.evaluate("document.querySelectorAll('article details').forEach(x => { x.open = true; })")
    tab.wait_for_function(STOPS_WHERE_IT_SCROLLS)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    assert tab.evaluate(PAST_THE_EDGE) == []


def test_formulas_are_set_when_they_come_near(opened):
    "The first screen is ready without the rest of a long page, and the rest follows."
    tab, _, _ = opened("20_trust_region", "light")
    first, last = tab.locator("article .math").first, tab.locator("article .math").last
    expect(first.locator("mjx-math")).to_be_visible()
    expect(last.locator("mjx-math")).to_have_count(0)
    last.scroll_into_view_if_needed()
    expect(last.locator("mjx-math")).to_be_visible()


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("name", toc_pages())
def test_text_is_readable(opened, name, mode):
    tab, _, _ = opened(name, mode)
    assert tab.evaluate(LOW_CONTRAST) == []


def test_figures_follow_the_mode(opened):
    "On black and on white, a figure's paper has the colour of the page."
    for mode, dark in ("light", False), ("dark", True):
        tab, _, _ = opened("60_figures", mode)
        image = tab.locator("article .cell_output img").first
        inverted = "invert" in image.evaluate("node => getComputedStyle(node).filter")
        assert inverted == dark


def test_search_finds_a_chapter(opened):
    tab, errors, elsewhere = opened("search", "light")
    tab.goto(tab.url + "?q=advantage")
    expect(tab.locator("#search-results > h2")).to_have_text("Search Results")
    found = tab.locator("#search-results li a").all_text_contents()
    assert any("Advantage" in text for text in found)
    assert errors == [] and elsewhere == []


def test_a_folded_solution_opens(opened):
    tab, _, _ = opened("10_verify", "light")
    solution = tab.locator("div.solution").first
    text = solution.locator("p").last
    expect(text).to_be_hidden()
    solution.locator(".toggle-button").click()  # the title is a link to the exercise
    expect(text).to_be_visible()


def test_a_folded_proof_opens(opened):
    tab, _, _ = opened("15_value_based", "light")
    proof = tab.locator("details.sd-dropdown", has=tab.locator("summary", has_text="Proof")).first
    expect(proof.locator("p").last).to_be_hidden()
    proof.locator("summary").click()
    expect(proof.locator("p").last).to_be_visible()


DEMOS = ["44_kl", "52_charts", "52a_demos", "52b_lm_demos"]
PHONE = {"viewport": {"width": 375, "height": 700}, "has_touch": True}


def drawn(tab):
    "The demos of a page, once all are drawn."
    tab.wait_for_function(
        "[...document.querySelectorAll('.po-demo')].every(node => 'ready' in node.dataset)"
    )
    return tab.locator(".po-demo")


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_is_moved_by_the_keyboard(opened, name):
    "Every slider is reached by Tab, and the reading follows the arrow keys."
    tab, errors, _ = opened(name, "light")
    for demo in filter(lambda demo: demo.is_visible(), drawn(tab).all()):
        reading, sliders = demo.locator("[role=status]"), demo.locator("input[type=range]")
        before = reading.text_content()
        sliders.first.focus()
        tab.keyboard.press("ArrowLeft")
        expect(reading).not_to_have_text(before)
        for slider in sliders.all()[1:]:
            tab.keyboard.press("Tab")
            expect(slider).to_be_focused()
    assert errors == []


@pytest.mark.parametrize("name", ["22_ppo", "52a_demos"])
def test_all_demos_can_be_moved_within_two_seconds(browser, url, name):
    "Of the processor, so that a busy machine does not count."
    context = browser.new_context()
    tab = context.new_page()
    tab.set_default_timeout(PATIENCE)
    meter = context.new_cdp_session(tab)
    meter.send("Performance.enable", {"timeDomain": "threadTicks"})
    tab.goto(f"{url}/{name}.html", timeout=PATIENCE)
    drawn(tab)
    metrics = meter.send("Performance.getMetrics")["metrics"]
    seconds = {metric["name"]: metric["value"] for metric in metrics}
    context.close()
    assert 0 < seconds["ScriptDuration"] < seconds["TaskDuration"] < 2


@pytest.mark.parametrize("name", ["52a_demos", "52b_lm_demos"])
def test_a_demo_is_usable_on_a_phone(opened, name):
    "It is as wide as the screen, and a finger moves it."
    tab, _, _ = opened(name, "light", **PHONE)
    demos = drawn(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    for picture in demos.locator(".po-demo-chart svg").all():
        assert 280 < picture.bounding_box()["width"] <= 375
    slider, reading = demos.first.locator("input").nth(1), demos.first.locator("[role=status]")
    box, before = slider.bounding_box(), reading.text_content()
    assert box["height"] >= 24
    slider.tap(position={"x": box["width"] - 12, "y": box["height"] / 2})
    expect(reading).not_to_have_text(before)


def test_a_dead_group_says_so(opened):
    tab, _, _ = opened("52b_lm_demos", "dark")
    group = drawn(tab).first
    for slider in group.locator("input[type=range]").all():
        slider.fill("0.5")
    expect(group.locator("[role=status]")).to_contain_text("DEAD GROUP")


def test_a_demo_has_the_colours_of_the_mode(opened):
    for mode, dark in ("light", False), ("dark", True):
        tab, _, _ = opened("52_charts", mode)
        style = drawn(tab).first.locator("svg").evaluate("node => getComputedStyle(node).filter")
        assert ("invert" in style) == dark


def test_without_javascript_a_demo_is_a_picture(browser, url):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(f"{url}/52a_demos.html", timeout=PATIENCE)
    stills = tab.locator(".po-demo img")
    assert stills.count() >= 4
    expect(stills.first).to_be_visible()
    context.close()


def preview(tab):
    return tab.locator(".po-preview")


def test_an_equation_is_shown_beside_its_link(opened):
    "Under the pointer, which may go into it; typeset, and in the colours of the mode."
    tab, errors, elsewhere = opened("22_ppo", "dark")
    link = tab.locator("article p a[href^='14_advantage.html#equation-']").first
    link.scroll_into_view_if_needed()
    link.hover()
    expect(preview(tab).locator("mjx-math").first).to_be_visible()
    preview(tab).hover()
    tab.wait_for_timeout(600)
    expect(preview(tab)).to_be_visible()
    color = preview(tab).evaluate("node => getComputedStyle(node).backgroundColor")
    assert sum(map(int, color[4:-1].split(","))) < 200
    tab.mouse.move(2, 2)
    expect(preview(tab)).to_have_count(0)
    assert errors == [] and elsewhere == []


def test_a_term_is_explained_to_the_keyboard(opened):
    tab, errors, _ = opened("14_advantage", "light")
    term = tab.locator("article a.po-term").nth(1)
    tab.locator("article a.po-term").first.focus()
    tab.keyboard.press("Tab")
    expect(term).to_be_focused()
    expect(preview(tab)).to_contain_text("The mean squared distance")
    assert term.get_attribute("aria-describedby") == preview(tab).get_attribute("id")
    tab.keyboard.press("Escape")
    expect(preview(tab)).to_have_count(0)
    expect(term).to_be_focused()
    assert errors == []


def test_a_finger_opens_a_definition_and_then_follows_it(opened):
    tab, _, _ = opened("14_advantage", "light", **PHONE)
    term = tab.locator("article a.po-term").nth(1)
    term.tap()
    expect(preview(tab)).to_be_visible()
    box = preview(tab).bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 375
    assert "14_advantage" in tab.url
    term.tap()
    tab.wait_for_url("**/glossary.html#term-variance")


def test_a_finger_follows_every_other_link_at_once(opened):
    tab, _, _ = opened("22_ppo", "light", **PHONE)
    tab.locator("article p a[href^='14_advantage.html#equation-']").first.tap()
    tab.wait_for_url("**/14_advantage.html#equation-*")


def test_the_cheat_sheet_is_one_sheet(opened):
    tab, _, _ = opened("cheat_sheet", "light")
    tab.evaluate("typesetPage()")
    tab.wait_for_function(
        "[...document.querySelectorAll('article .math')].every(x => x.querySelector('mjx-math'))"
    )
    paper = tab.pdf(format="A4", prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", paper)) == 1
