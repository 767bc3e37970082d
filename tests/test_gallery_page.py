"""The page of the gallery in a headless browser: what one reads, clicks and types."""

import base64
import json

import numpy as np
import pytest

from tests.browser import (
    HOSTILE_CLASS,
    HOSTILE_TEXT,
    JUSTIFIED,
    LENGTHS,
    VISIT_ALL,
    Page,
    axe_violations,
    browser_binaries,
    checked_page,
    console_errors,
    invented_gallery,
    packed,
    received,
    requested_urls,
    set_scheme,
    set_width,
)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """A folder with a gallery of 2 layers."""
    browser_binaries()
    return invented_gallery(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def plain_gallery(tmp_path_factory):
    """A gallery without pictures, classifier and controls."""
    browser_binaries()
    folder = tmp_path_factory.mktemp("plain")
    few = {"layers": (9,), "neurons": 30, "counts": {"train": 40}}
    return invented_gallery(folder, plain=True, graded=None, **few)


@pytest.fixture(scope="module")
def noise_gallery(tmp_path_factory):
    """A gallery of a layer whose descriptions are no better than noise."""
    browser_binaries()
    folder = tmp_path_factory.mktemp("noise")
    return invented_gallery(folder, graded="noise", layers=(9,), neurons=30, counts={"train": 40})


@pytest.fixture
def page(browser, gallery):
    """The grid of the first layer; after the test the console has no error and no request has left the
    folder.
    """
    yield from checked_page(browser, gallery)


@pytest.fixture
def plain_page(browser, plain_gallery):
    """The same of the plain gallery."""
    yield from checked_page(browser, plain_gallery)


@pytest.fixture
def noise_page(browser, noise_gallery):
    """The same of the gallery of noise."""
    yield from checked_page(browser, noise_gallery)


def match_level(text, query):
    """3 for the whole text, 2 for the start of a word, 1 for a part of one, 0 for none."""
    if query not in text:
        return 0
    starts = [i for i in range(len(text)) if text.startswith(query, i)]
    return 3 if text == query else 2 if any(i == 0 or not text[i - 1].isalnum() for i in starts) else 1


def unpacked(text, dtype):
    """The array that a base64 text holds."""
    return np.frombuffer(base64.b64decode(text), dtype)


def expected_matches(about, layer, index, query):
    """The neurons that a search finds, best first, and how many of them by their descriptions."""
    alone, described = {}, {}
    for i, (n, value) in enumerate(
        zip(unpacked(index["neurons"], "<u2"), unpacked(index["correlations"], np.int8), strict=True)
    ):
        level = match_level(about["texts"][i // index["count"]].lower(), query)
        if level:
            alone[n] = max(alone.get(n, 0), 2 * level + value / 127)
    for name in ("fires_on", "writes"):
        side = layer[name]
        ids, values = (np.reshape(side[key], (-1, side["shown"])) for key in ("texts", "coefficients"))
        for n in range(len(ids)):
            for text, value in zip(ids[n], values[n], strict=True):
                level = match_level(about["texts"][text].lower(), query) if text >= 0 else 0
                over = side["grade"][n] - side["control"][n]
                if level:
                    score = 2 * level + max(abs(value / values[n][0]) * over, 0)
                    described[n] = max(described.get(n, 0), score)
    scores = {n: (n in described, described.get(n, alone.get(n))) for n in {*alone, *described}}
    return sorted(scores, key=lambda n: (-scores[n][0], -scores[n][1], n)), len(described)


def addresses_of_neurons(about):
    """The address of every neuron."""
    return [f"#{layer}/{n}" for layer in about["layers"] for n in range(about["neurons"])]


def test_every_neuron_s_address_opens_within_one_visit(page):
    addresses = addresses_of_neurons(page.about)
    titles = page.driver.execute_async_script(VISIT_ALL, addresses)
    assert titles == ["Layer {}, neuron {}".format(*address[1:].split("/")) for address in addresses]


@pytest.mark.parametrize(
    "address", ["", "#8", "#9", "#8/0", "#9/63", "#9/64", "#9/129", "#image/train/299", "#image/val/0/8"]
)
def test_an_address_opens_as_the_first_page_of_a_visit(page, address):
    page.open(address)
    parts = address[1:].split("/")
    if "image" in address:
        assert page.title().startswith(f"Image {parts[2]} of {parts[1]}")
    else:
        assert page.title() == f"Layer {parts[0] or 8}" + (f", neuron {parts[1]}" if len(parts) > 1 else "")


@pytest.mark.parametrize(
    "address", ["#7", "#9/130", "#9/x", "#image/test/0", "#image/train/300", "#image/__proto__/0", "#9/1/2"]
)
def test_an_address_of_nothing_says_so_and_leads_to_the_grid(page, address):
    page.open(address)
    assert page.title() == "Not found"
    page.click(".error a")
    page.settle("#8")
    assert page.title() == "Layer 8"


def test_the_search_narrows_the_grid_with_each_letter(page):
    layer, index = received(page.folder, "8/layer"), received(page.folder, "8/texts")
    for letter, query in (("d", "d"), ("o", "do"), ("g", "dog")):
        page.type(letter)
        expected, described = expected_matches(page.about, layer, index, query)
        alone = len(expected) - described
        assert page.address() == f"#8?q={query}"
        assert page.status().startswith(
            f"{len(expected)} of {page.about['neurons']} neurons match: {described} by their descriptions"
        )
        assert (f"{alone} only because the text predicts their effects" in page.status()) == (alone > 0)
        assert page.neurons()[:16] == expected[:16]
    assert len(expected) < page.about["neurons"]
    marked = page.script(
        "return [...document.querySelectorAll('.card')]"
        ".map((card) => card.querySelector('mark')?.textContent)"
    )
    assert set(marked) == {"dog"}


def test_an_index_of_four_bytes_finds_the_same_neurons(page):
    path = page.folder / "data/8/texts.js"
    before = path.read_text()
    page.open("#8?q=dog")
    found, index = page.neurons(), received(page.folder, "8/texts")
    numbers = packed(unpacked(index["neurons"], "<u2").astype("<u4"))
    try:
        path.write_text(f'gallery.receive("texts 8", {json.dumps({**index, "neurons": numbers})});')
        page.open("#8?q=dog")
        assert found and page.neurons() == found
    finally:
        path.write_text(before)


def test_descriptions_come_before_texts_alone_and_a_whole_text_before_a_part(page):
    page.open("#8?q=dog")
    count = int(page.status().split()[0])
    page.until(lambda _: page.script("window.scrollTo(0, 1e6)") or len(page.neurons()) == count)
    found = page.script(
        "return [...document.querySelectorAll('.card li:has(mark)')]"
        ".map((li) => [li.title, li.querySelector('.alone') !== null])"
    )
    alone = [is_alone for _, is_alone in found]
    assert alone == sorted(alone) and set(alone) == {True, False}
    for which in (True, False):
        levels = [match_level(text, "dog") for text, is_alone in found if is_alone == which]
        assert levels == sorted(levels, reverse=True) and set(levels) == {3, 2, 1}


def test_a_number_finds_its_neuron_first(page):
    page.type("41")
    assert page.neurons()[0] == 41


def test_a_search_that_finds_nothing_says_so_and_the_field_gives_the_grid_back(page):
    page.type("no such text")
    assert page.status() == "0 of 130 neurons match." and page.neurons() == []
    page.press("\ue00c")
    page.until(lambda _: page.address() == "#8")
    page.settle()
    assert page.status() == "130 neurons."


@pytest.mark.parametrize("sort", ["fires_on", "writes", "explained", "norm", "number"])
def test_the_grid_is_sorted_by_each_key(page, sort):
    layer = received(page.folder, "8/layer")
    column = {
        "explained": layer["explained"],
        "norm": layer["norm"],
        "number": [0] * page.about["neurons"],
        **{side: np.subtract(layer[side]["grade"], layer[side]["control"]) for side in JUSTIFIED},
    }[sort]
    page.choose("number" if sort != "number" else "norm")
    page.choose(sort)
    expected = sorted(range(len(column)), key=lambda n: (-column[n], n))
    assert page.neurons()[:16] == expected[:16]


@pytest.mark.parametrize(("sort", "sign"), [("for", 1), ("against", -1)])
def test_the_grid_is_sorted_by_what_speaks_for_or_against_a_class(page, sort, sign):
    page.choose(sort)
    page.find("#class").send_keys("red fox")
    label = page.about["class_names"].index("red fox")
    page.until(lambda _: page.address() == f"#8?sort={sort}&class={label}")
    page.settle()
    values = np.frombuffer(base64.b64decode(received(page.folder, "8/classes")["values"]), np.int8).reshape(
        -1, page.about["neurons"]
    )
    expected = sorted(range(page.about["neurons"]), key=lambda n: (-sign * int(values[label, n]), n))
    assert page.neurons()[:16] == expected[:16]


def test_a_class_that_is_there_twice_can_be_told_apart(page):
    page.choose("for")
    page.find("#class").send_keys("crane (class 4)")
    page.until(lambda _: page.address() == "#8?sort=for&class=4")


def test_the_grid_grows_to_all_neurons_as_one_scrolls(page):
    assert len(page.neurons()) < page.about["neurons"]

    def at_the_end(_):
        page.script("window.scrollTo(0, document.documentElement.scrollHeight)")
        return len(page.neurons()) == page.about["neurons"]

    page.until(at_the_end)
    assert sorted(page.neurons()) == list(range(page.about["neurons"]))


def test_back_and_forward_lead_through_the_pages_one_has_seen(page):
    page.open("#9")
    page.type("dog")
    first = page.find(".card a").get_attribute("href").split("#")[1]
    page.click(".card a")
    page.settle(f"#{first}")
    other = page.find("a[href^='#8/'], a[rel=next]").get_attribute("href").split("#")[1]
    page.go(f"#{other}")
    page.driver.back()
    page.settle(f"#{first}")
    assert page.title() == "Layer {}, neuron {}".format(*first.split("/"))
    page.driver.back()
    page.settle("#9?q=dog")
    assert page.title() == "Layer 9" and page.find("#search").get_property("value") == "dog"
    assert page.focused() == f"#{first}"
    page.driver.forward()
    page.settle(f"#{first}")
    assert page.title() == "Layer {}, neuron {}".format(*first.split("/"))


def test_back_leads_to_the_place_of_the_grid_that_one_left(page):
    page.until(
        lambda _: (
            page.script("window.scrollTo(0, 1e6); return document.querySelectorAll('.card').length") == 130
        )
    )
    page.script("window.scrollTo(0, 3000)")
    page.go("#8/5")
    assert page.script("return scrollY") == 0
    page.driver.back()
    page.settle("")
    page.until(lambda _: page.script("return scrollY") == 3000)


def shown_texts(page, side):
    """The lines of a side's list on the page of a neuron."""
    return page.script(
        "return [...document.querySelectorAll(`[aria-label='Texts: ${arguments[0]}'] li`)]"
        ".map((li) => li.textContent)",
        side.replace("_", " "),
    )


def section(page, title):
    """The text of a section of the page."""
    return page.driver.find_element("xpath", f"//section[h2='{title}']").text


def table_of(page, title):
    """The rows of the first table of a section, {title: cells}."""
    rows = page.driver.find_elements("xpath", f"(//section[h2='{title}']//table)[1]/tbody/tr")
    return [
        (row.find_element("tag name", "th").text, [td.text for td in row.find_elements("tag name", "td")])
        for row in rows
    ]


def test_a_neuron_page_shows_what_its_data_say(page):
    page.open("#9/3")
    detail = received(page.folder, "9/neurons_0")["neurons"][3]
    texts = page.about["texts"]
    for side, title in (("fires_on", "Fires on"), ("writes", "Writes")):
        shown = shown_texts(page, side)
        assert len(shown) == JUSTIFIED[side]
        for text, (number, value) in zip(shown, detail["shown"][side], strict=True):
            assert (
                text == f"{texts[number]}{value:+.2f}".replace("-", "−") if "-" not in texts[number] else text
            )
        grade, control, _ = detail["by_length"][side][LENGTHS.index(JUSTIFIED[side])]
        said = section(page, title)
        assert f"grade {grade:.2f}, control {control:.2f}" in said
        assert f"With this pool {JUSTIFIED[side]} texts are justified" in said
        rows = table_of(page, title)
        assert rows[0] == ("its texts", [f"{grade:.2f}" for grade, _, _ in detail["by_length"][side]])
        assert rows[1] == ("control", [f"{control:.2f}" for _, control, _ in detail["by_length"][side]])
        better = ["yes" if better else "no" for _, _, better in detail["by_length"][side]]
        assert rows[2] == ("better than noise", better)
    rows = dict(table_of(page, "Fires on"))
    grade, control, _ = detail["by_length"]["wpmi"][0]
    assert rows["rotated units, mean of the layer"] == ["0.10", "0.20", "0.30", "0.40", "0.50", "0.60"]
    assert rows["its label by soft-WPMI"] == [f"{grade:.2f}", *[""] * 5]
    assert rows["its control"] == [f"{control:.2f}", *[""] * 5]
    null = f"{detail['grades']['null_fires_on']['pearson']:.2f}".replace("-", "−")
    assert rows["another neuron's texts"] == [*[""] * 5, null]
    assert "do not tell neurons from rotated units (texts that it fires on): correlation." in section(
        page, "Fires on"
    )
    rows = page.script(
        "return [...document.querySelectorAll('details tr.own td')].map((cell) => cell.textContent)"
    )
    grades = [
        detail["grades"][side][key]
        for side in ("fires_on", "writes")
        for key in ("pearson", "pearson_without", "auprc", "auprc_without", "drop")
    ]
    assert [float(cell.replace("−", "-")) for cell in rows] == pytest.approx(grades, abs=0.0051)
    labels = page.script(
        "return [...document.querySelectorAll('canvas')].map((canvas) => canvas.getAttribute('aria-label'))"
    )
    expected = []
    for split in ("train", "val"):
        for sign in ("positive", "negative"):
            for row, projection, _ in detail["top"][split][sign]:
                name = page.about["class_names"][page.about["splits"][split]["labels"][row]]
                expected.append(
                    f"{name}, projection {projection:+.3g}".replace("projection -", "projection −")
                )
    assert labels == expected
    assert page.script(
        "return [...document.querySelectorAll('svg')]"
        ".every((s) => s.getAttribute('role') === 'img' && s.ariaLabel)"
    )


def test_a_button_shows_the_texts_that_are_not_justified(page):
    page.open("#9/3")
    detail = received(page.folder, "9/neurons_0")["neurons"][3]
    assert len(shown_texts(page, "writes")) == JUSTIFIED["writes"]
    page.driver.find_element("xpath", "//section[h2='Writes']//button").click()
    assert [
        line.startswith(page.about["texts"][i])
        for line, (i, _) in zip(shown_texts(page, "writes"), detail["writes"], strict=True)
    ] == [True] * page.about["components"]
    assert page.driver.find_elements("xpath", "//section[h2='Writes']//button") == []


def test_the_head_of_a_layer_says_what_is_over_noise(page):
    layer = received(page.folder, "8/layer")
    lines = page.script("return [...document.querySelectorAll('.claim li')].map((li) => li.textContent)")
    assert lines == [
        f"{title}: {layer[side]['judged']['better']} of 130 neurons have a description better than noise; "
        f"by chance 4 would. {JUSTIFIED[side]} texts are justified."
        for side, title in (("fires_on", "Fires on"), ("writes", "Writes"))
    ]


def cards(page):
    """{neuron: [fires on, writes]}, the lines of both sides of the cards."""
    found = page.script(
        "return [...document.querySelectorAll('.card')].map((card) =>"
        " [...card.querySelectorAll('.side > div')].map((side) => side.innerText.split('\\n')))"
    )
    return dict(zip(page.neurons(), found, strict=True))


def test_a_card_shows_texts_only_where_they_are_better_than_noise(page):
    page.open("#8?sort=number")
    layer = received(page.folder, "8/layer")
    seen = set()
    for n, sides in cards(page).items():
        for side, lines in zip(("fires_on", "writes"), sides, strict=True):
            of = layer[side]
            number = f"{of['grade'][n]:.2f} ({of['control'][n]:.2f})".replace("-", "−")
            assert lines[:2] == [side.replace("_", " "), number]
            first = n * of["shown"]
            signs = zip(of["texts"][first:], of["coefficients"][first:], strict=True)
            texts = [("− " if c < 0 else "") + page.about["texts"][i] for i, c in list(signs)[:3] if i >= 0]
            expected = texts[: of["shown"]] if of["better"][n] else ["no better than noise"]
            assert [line for line in lines[2:] if line] == expected
            seen.add(bool(of["better"][n]))
    assert seen == {True, False}


def test_a_neuron_no_better_than_noise_says_so_and_keeps_its_texts_behind_a_button(page):
    better = received(page.folder, "9/layer")["fires_on"]["better"]
    n = better.index(0)
    page.open(f"#9/{n}")
    assert shown_texts(page, "fires_on") == []
    assert "No better than noise: 8 texts reach" in section(page, "Fires on")
    page.driver.find_element("xpath", "//section[h2='Fires on']//button").click()
    assert len(shown_texts(page, "fires_on")) == page.about["components"]
    assert len(page.driver.find_elements("css selector", ".pictures canvas")) == 32


def test_a_neuron_that_was_deleted_says_what_happens_without_it(page):
    page.open("#8/5")
    said = section(page, "Without it")
    assert "with a correlation of 0.94; another neuron's with −0.01 on average" in said
    without = received(page.folder, "8/neurons_0")["neurons"][5]["without"]
    for title, name in (("Falls", "falls"), ("Rises", "rises")):
        assert all(page.about["texts"][text] in said for text, _ in without[name]) and title in said
    page.open("#8/4")
    assert not page.driver.find_elements("xpath", "//section[h2='Without it']")


def test_a_layer_of_noise_says_that_no_text_names_its_neurons(noise_page):
    page = noise_page
    said = page.find(".claim").text
    assert said.startswith("No text names these neurons:")
    assert "Writes: at most 3 of 30 neurons pass as better than noise; by chance 4 would." in said
    keys = page.script("return [...document.querySelectorAll('#sort option')].map((one) => one.value)")
    assert keys[0] == "explained" and not {"fires_on", "writes"} & set(keys)
    assert page.script("return document.querySelectorAll('.meter, .card li').length") == 0
    assert page.script("return document.querySelectorAll('.card .none').length") == 2 * len(page.neurons())
    page.open("#9?q=dog")
    assert page.status() == "0 of 30 neurons match."  # any text predicts the effects of such a layer
    page.open("#9?q=7")
    assert page.neurons() == [7]
    page.open("#9/3")
    for title in ("Fires on", "Writes"):
        assert "No better than noise: in this layer no number of texts" in section(page, title)
    page.driver.find_element("xpath", "//section[h2='Writes']//button").click()
    assert len(shown_texts(page, "writes")) == page.about["components"]
    page.open("#image/train/7")
    assert page.script("return document.querySelectorAll('.thirds .none').length") == 2
    assert page.script("return document.querySelectorAll('.thirds .bars').length") == 1


def test_a_button_hides_and_shows_where_the_neuron_fires(page):
    page.open("#9/3")
    drawn = (
        "return [...new Set([...document.querySelectorAll('canvas')]"
        ".map((canvas) => canvas.dataset.drawn))].join()"
    )
    for pressed, kind in (("true", "map"), ("false", "plain"), ("true", "map")):
        assert page.find("button[aria-pressed]").get_attribute("aria-pressed") == pressed
        page.until(lambda _, kind=kind: page.script(drawn) == kind)
        page.click("button[aria-pressed]")


def test_an_image_page_shows_its_active_neurons_and_links_to_them(page):
    page.open("#image/train/260/8")
    image = received(page.folder, "8/images_train_1")["images"][260 - 256]
    page.until(
        lambda _: (
            page.script("window.scrollTo(0, 1e6); return document.querySelectorAll('.card').length") == 30
        )
    )
    assert page.neurons() == [neuron for neuron, _ in image["neurons"]]
    concepts = page.script(
        "return [...document.querySelectorAll('.thirds > div')].map((list) =>"
        " [list.querySelector('h3').textContent, [...list.querySelectorAll('a')].map((a) => a.textContent)])"
    )
    forms = {"fires_on": "Fires on", "writes": "Writes", "nearest": "Nearest texts, without neurons"}
    assert concepts == [
        [title, [page.about["texts"][word] for word, _ in image[form]]] for form, title in forms.items()
    ]
    page.script("window.scrollTo(0, 0)")
    page.click(".card a")
    page.settle(f"#8/{image['neurons'][0][0]}")
    page.driver.back()
    page.settle("#image/train/260/8")
    page.click("nav[aria-label='Layers of this image'] a:not([aria-current])")
    page.settle("#image/train/260/9")
    assert page.find("h2:last-of-type") and "layer 9" in page.script("return document.body.textContent")


def test_a_picture_of_a_neuron_page_leads_to_its_image(page):
    page.open("#9/3")
    link = page.find(".pictures a")
    address = "#" + link.get_attribute("href").split("#")[1]
    link.click()
    page.settle(address)
    assert page.title().startswith("Image ")


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "address", ["#9", "#9?q=dog", "#9?sort=for&class=1", "#9/41", "#image/val/7", "#nothing"]
)
def test_axe_finds_no_serious_or_critical_fault(page, address, scheme, width):
    set_scheme(page.driver, scheme)
    set_width(page.driver, width)
    page.open(address)
    assert axe_violations(page.driver) == []
    assert page.script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("address", ["#9", "#9?q=dog", "#9/3", "#image/train/7"])
def test_axe_finds_no_fault_in_a_layer_of_noise(noise_page, address, scheme):
    set_scheme(noise_page.driver, scheme)
    noise_page.open(address)
    assert axe_violations(noise_page.driver) == []


def test_the_colours_follow_the_reader_s_scheme(page):
    colours = []
    for scheme in ("light", "dark"):
        set_scheme(page.driver, scheme)
        rgb = page.script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        colours.append(sum(rgb))
    assert colours[0] > 600 > 200 > colours[1]


def test_foreign_names_and_texts_stay_text(page):
    label = page.about["class_names"].index(HOSTILE_CLASS)
    row = page.about["splits"]["val"]["labels"].index(label)
    for address in (f"#9?sort=for&class={label}", f"#image/val/{row}", "#9/3", "#9?q=%3C%2Fscript%3E%3Cb%3E"):
        page.open(address)
        assert page.script("return document.querySelectorAll('main img, main b, main script').length") == 0
    assert HOSTILE_TEXT in page.script("return document.querySelector('mark').textContent")
    page.open(f"#image/val/{row}")
    assert page.title() == f"Image {row} of val: {HOSTILE_CLASS}"


def test_the_policy_refuses_inline_scripts_styles_and_foreign_pictures(page):
    page.script("""
      window.ran = false;
      const script = document.createElement("script");
      script.textContent = "window.ran = true";
      document.body.append(script);
      document.body.insertAdjacentHTML("beforeend", '<p id="styled" style="color: red">x</p><img src="https://example.invalid/x.png">');
    """)
    errors = []

    def refused(_):
        errors.extend(console_errors(page.driver))
        return len(errors) >= 3

    page.until(refused)
    assert all("Content Security Policy" in error for error in errors)
    assert page.script("return window.ran") is False
    assert page.script("return document.getElementById('styled').style.color") == ""
    assert [url for url in requested_urls(page.driver) if not url.startswith("file:")] == [
        "https://example.invalid/x.png"
    ]


def test_a_slash_focuses_the_search_and_an_arrow_leads_to_the_first_card(page):
    from selenium.webdriver import Keys

    page.press("/")
    assert page.script("return document.activeElement.id") == "search"
    page.press("d", "o", "g", "/", Keys.BACKSPACE)
    page.until(lambda _: page.address() == "#8?q=dog")
    page.settle()
    page.press(Keys.ARROW_DOWN)
    assert page.focused() == f"#8/{page.neurons()[0]}"


def test_arrows_move_among_cards_enter_opens_one_and_escape_leads_back(page):
    from selenium.webdriver import Keys

    neurons = page.neurons()
    columns = len(
        page.script("return getComputedStyle(document.querySelector('.cards')).gridTemplateColumns").split()
    )
    page.press("/", Keys.ARROW_DOWN)
    for key, at in (
        (Keys.ARROW_RIGHT, 1),
        (Keys.ARROW_DOWN, 1 + columns),
        (Keys.ARROW_LEFT, columns),
        (Keys.ARROW_UP, 0),
        (Keys.ARROW_UP, 0),
        (Keys.TAB, 1),
    ):
        page.press(key)
        assert page.focused() == f"#8/{neurons[at]}"
    page.press(Keys.ENTER)
    page.settle(f"#8/{neurons[1]}")
    page.press(Keys.ESCAPE)
    page.settle("#8")
    assert page.title() == "Layer 8"
    assert page.focused() == f"#8/{neurons[1]}"


def test_arrows_reach_the_cards_that_are_not_drawn_yet(page):
    from selenium.webdriver import Keys

    page.press("/", Keys.ARROW_DOWN)
    for _ in range(29):
        page.press(Keys.ARROW_RIGHT)
    assert page.focused() == f"#8/{page.neurons()[29]}"


def test_left_and_right_lead_to_the_previous_and_the_next_neuron(page):
    from selenium.webdriver import Keys

    page.open("#8/63")
    page.press(Keys.ARROW_RIGHT)
    page.settle("#8/64")
    page.press(Keys.ARROW_LEFT)
    page.settle("#8/63")
    page.open("#8/0")
    page.press(Keys.ARROW_LEFT)
    assert page.address() == "#8/0"


def test_escape_on_a_neuron_page_leads_back_to_the_search_one_made(page):
    from selenium.webdriver import Keys

    page.type("dog")
    page.go("#8/7")
    page.press(Keys.ESCAPE)
    page.settle("#8?q=dog")
    assert page.find("#search").get_property("value") == "dog"


def test_typing_on_a_neuron_page_searches_its_layer_and_back_leads_to_the_neuron(page):
    page.open("#9/5")
    page.press("/")
    page.press(*"dog")
    page.until(lambda _: page.address() == "#9?q=dog")
    page.settle()
    page.driver.back()
    page.settle("#9/5")


def test_few_images_are_told(page):
    page.open("#9")
    said = page.find(".claim .few").text
    error = "the correlation of a single neuron has a standard error of up to 0.13"
    assert said == f"Few images. Graded on 60 held-out images only: {error}."


def test_without_controls_nothing_is_claimed(plain_page):
    page = plain_page
    assert page.find(".claim").text.startswith("Not graded:")
    assert page.script("return document.querySelectorAll('.meter').length") == 0
    for sides in cards(page).values():
        for lines in sides:
            assert lines[1] == "not graded" and len(lines) == 5
    page.open("#9/3")
    assert page.script("return document.querySelectorAll('table, .meter').length") == 0
    for side, title in (("fires_on", "Fires on"), ("writes", "Writes")):
        assert "Not graded:" in section(page, title)
        assert len(shown_texts(page, side)) == 12
    page.driver.find_element("xpath", "//section[h2='Writes']//button").click()
    assert len(shown_texts(page, "writes")) == page.about["components"]


def test_without_sheets_no_picture_is_requested_and_every_page_works(plain_page):
    page = plain_page
    assert page.script("return document.getElementById('sort').value") == "explained"
    addresses = [f"#9/{n}" for n in range(30)] + [f"#image/train/{row}" for row in range(40)]
    titles = page.driver.execute_async_script(VISIT_ALL, addresses)
    assert "Not found" not in titles and len(set(titles)) == 70
    page.go("#9?q=dog")
    assert 0 < len(page.neurons()) < 30
    assert page.script("return document.querySelectorAll('canvas, .thumb, img').length") == 0
    assert axe_violations(page.driver) == []
    assert [
        url
        for url in requested_urls(page.driver)
        if "pictures" in url or not url.startswith(page.folder.as_uri())
    ] == []


def test_a_file_that_is_missing_is_named_and_the_rest_still_works(browser, tmp_path):
    browser_binaries()
    folder = invented_gallery(tmp_path / "gallery", neurons=10, counts={"train": 20})
    (folder / "data" / "9" / "layer.js").unlink()
    page = Page(browser, folder)
    page.open("#9")
    assert "data/9/layer.js is missing" in page.find(".error").text
    page.go("#8")
    assert len(page.neurons()) == 10
    assert any("ERR_FILE_NOT_FOUND" in error for error in console_errors(browser))
