"""A headless Chromium for tests of pages, and an invented gallery for them to open."""

import base64
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HANGS = 300  # seconds after which the browser counts as hanging, however busy the machine is
GALLERY = Path(__file__).parent.parent / "applications" / "gallery"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # small in containers
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-ipc-flooding-protection",  # lets a test change the address more than 200 times in 10 seconds
    "--window-size=1400,900",
)
SETTLED = """
const main = document.getElementById("main");
return main.getAttribute("aria-busy") === "false" && main.dataset.shown === location.hash
  && (arguments[0] === null || location.hash === arguments[0])
  && [...document.querySelectorAll("canvas")].every((canvas) => canvas.dataset.drawn);
"""
VISIT_ALL = """
const [addresses, done] = arguments;
const main = document.getElementById("main");
const titles = [];
const next = () => {
  if (titles.length === addresses.length) done(titles);
  else location.hash = addresses[titles.length];
};
new MutationObserver((_, observer) => {
  if (main.dataset.shown !== addresses[titles.length]) return;
  titles.push(main.querySelector("h1").textContent);
  next();
  if (titles.length === addresses.length) observer.disconnect();
}).observe(main, { attributeFilter: ["data-shown"] });
next();
"""
LENGTHS = [1, 2, 4, 8, 16, 20]  # numbers of texts that the invented gallery grades
JUSTIFIED = {"fires_on": 8, "writes": 2}
HOSTILE_CLASS = "<img src=x onerror=alert(1)>"
HOSTILE_TEXT = "</script><b>"


def browser_binaries():
    """The paths of Chromium and chromedriver; skips the test where one of them, or selenium, is missing."""
    pytest.importorskip("selenium", reason="selenium is not installed")
    chromium, driver = os.environ.get("CHROME_BIN") or shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium:
        pytest.skip("there is no chromium, neither on the PATH nor in CHROME_BIN")
    if not driver:
        pytest.skip("there is no chromedriver on the PATH")
    return chromium, driver


def start_browser(profile):
    """A browser with a profile of its own, on an empty page, that logs its console and its requests."""
    chromium, chromedriver = browser_binaries()
    from selenium import webdriver
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    except WebDriverException as error:
        pytest.skip(f"chromium does not start here: {str(error).splitlines()[0]}")
    driver.set_page_load_timeout(HANGS)
    driver.set_script_timeout(HANGS)
    driver.get("about:blank")
    driver.get_log("performance")  # the requests of the browser's own first page
    return driver


def console_errors(driver):
    """What the console reported since the last call as an error or a warning; a breach of the CSP is one."""
    return [
        entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ]


def requested_urls(driver):
    """The addresses that were requested since the last call, those that the CSP or a missing file refused
    included.
    """
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def set_scheme(driver, scheme):
    """Let the page believe that its reader prefers `scheme`, light or dark."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def set_width(driver, width, height=900):
    """Show the page `width` CSS pixels wide, as a phone would; None goes back to the window's own size."""
    if width is None:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    else:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def axe_violations(driver):
    """The serious and critical faults that axe-core finds on the page, each with the elements that have
    it.
    """
    package = importlib.util.find_spec("axe_core_python")
    if package is None:
        pytest.skip("axe-core-python is not installed")
    script = Path(package.origin).parent / "axe.min.js"
    driver.execute_script(script.read_text(encoding="utf-8"))
    result = driver.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")
    return [
        f"{fault['impact']}: {fault['id']}: {node['target']} {node['failureSummary']}"
        for fault in result["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


class Page:
    """What the tests do with the page."""

    def __init__(self, driver, folder):
        self.driver, self.folder = driver, folder
        self.script = driver.execute_script
        self.about = received(folder, "about")

    def until(self, condition):
        """Wait for a condition and return its value."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, HANGS, poll_frequency=0.05).until(condition)

    def settle(self, address=None):
        """Wait until the page at the address is drawn, its pictures included."""
        self.until(lambda driver: driver.execute_script(SETTLED, address))

    def open(self, address=""):
        """Load the page afresh."""
        self.driver.get("about:blank")
        self.driver.get(self.folder.joinpath("index.html").as_uri() + address)
        self.settle(address)

    def go(self, address):
        """Follow an address within the page."""
        self.script("location.hash = arguments[0]", address)
        self.settle(address)

    def find(self, selector):
        """The first element of a selector."""
        return self.driver.find_element("css selector", selector)

    def click(self, selector):
        """Click as a reader does."""
        self.find(selector).click()

    def press(self, *keys):
        """Press keys, wherever the focus is."""
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def address(self):
        """The hash that the address bar shows."""
        return self.script("return location.hash")

    def title(self):
        """The main heading."""
        return self.script("return document.querySelector('h1').textContent")

    def status(self):
        """What the page says about the grid."""
        return self.script("return document.getElementById('status').textContent")

    def neurons(self):
        """The numbers of the cards' neurons, in order."""
        links = self.script(
            "return [...document.querySelectorAll('.card a')].map((a) => a.getAttribute('href'))"
        )
        return [int(link.split("/")[1]) for link in links]

    def focused(self):
        """The address to which the focused link leads."""
        return self.script("return document.activeElement.getAttribute('href')")

    def choose(self, sort):
        """Choose a sort key."""
        from selenium.webdriver.support.ui import Select

        Select(self.find("#sort")).select_by_value(sort)
        self.until(lambda _: f"sort={sort}" in self.address())
        self.settle()

    def type(self, text):
        """Type in the search field and wait for what it finds."""
        self.find("#search").send_keys(text)
        self.until(
            lambda driver: driver.execute_script("return document.getElementById('search').value").endswith(
                text
            )
        )
        self.settle()


def checked_page(browser, folder):
    """A page that is watched while a test uses it."""
    set_scheme(browser, "light")
    set_width(browser, None)
    console_errors(browser)
    requested_urls(browser)
    page = Page(browser, folder)
    page.open()
    yield page
    assert console_errors(browser) == []
    page.requests = [url for url in requested_urls(browser) if url != "about:blank"]
    assert [url for url in page.requests if not url.startswith(folder.as_uri() + "/")] == []


def received(folder, path):
    """The value of a data file."""
    text = (folder / "data" / f"{path}.js").read_text(encoding="utf-8")
    return json.loads(f"[{text[text.index('(') + 1 : text.rindex(')')]}]")[1]


def packed(array):
    """The base64 of an array's bytes."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def invented_side(rng, neurons, components, n_texts):
    """Ids [neurons, components] of different texts for each neuron, and signed coefficients, strongest
    first.
    """
    ids = np.stack([rng.choice(n_texts, components, replace=False) for _ in range(neurons)])
    sizes = -np.sort(-rng.gamma(1.5, 0.1, size=(neurons, components)), axis=1)
    return ids, np.round(sizes * rng.choice([1, 1, 1, -1], size=sizes.shape), 4)


def invented_images(rng, folder, split, count, sheet):
    """Sheets of plain pictures with a square in each, `count` of them."""
    size, columns, per_sheet = sheet["size"], sheet["columns"], sheet["columns"] * sheet["rows"]
    for number in range(-(-count // per_sheet)):
        here = min(per_sheet, count - number * per_sheet)
        picture = Image.new("RGB", (columns * size, -(-here // columns) * size))
        for place in range(here):
            colours = rng.integers(0, 256, size=(2, 3))
            tile = np.broadcast_to(colours[0], (size, size, 3)).astype(np.uint8).copy()
            top, left = rng.integers(0, size // 2, size=2)
            tile[top : top + size // 2, left : left + size // 2] = colours[1]
            picture.paste(Image.fromarray(tile), (place % columns * size, place // columns * size))
        picture.save(folder / f"{split}_{number}.jpg", quality=80)


def invented_about(rng, layers, neurons, counts, texts, components, plain):
    """The gallery's description."""
    class_names = ["tench", HOSTILE_CLASS, "crane", "tabby cat", "crane", "school bus", "volcano", "red fox"]
    syllables = ["ka", "lo", "mi", "ne", "ru", "ta", "vo", "sen", "dor", "bil"]
    words = [" ".join("".join(rng.choice(syllables, 2)) for _ in range(1 + i % 3)) for i in range(196)]
    return {
        "model": "ViT-B-32",
        "pretrained": "openai",
        "dataset": "imagenet",
        "layers": list(layers),
        "neurons": neurons,
        "units": None,
        "neuron_chunk": 64,
        "image_chunk": 256,
        "grid": [6, 6],
        "sheet": None if plain else {"columns": 8, "rows": 8, "size": 96},
        "splits": {
            split: {
                "count": count,
                "dataset": "imagenet",
                "labels": rng.integers(0, len(class_names), count).tolist(),
                "files": [f"n01440764/{split}_{i}.JPEG" for i in range(count)],
            }
            for split, count in counts.items()
        },
        "class_names": class_names,
        "texts": texts or ["dog", "hotdog stand", "a dog on grass", HOSTILE_TEXT, *words],
        "text_set": "invented",
        "components": components,
        "k": 100,
        "classifier": not plain,
        "graded_on": "val",
        "graded_images": counts.get("val", 0),
        "sides": {"writes": ["writes", "null_writes"], "fires_on": ["fires_on", "wpmi", "null_fires_on"]},
        "rows": {
            "writes": "texts that it writes",
            "fires_on": "texts that it fires on",
            "wpmi": "its label by soft-WPMI",
            "null_writes": "another neuron's texts that it writes",
            "null_fires_on": "another neuron's texts that it fires on",
            "rotated_fires_on": "rotated units: texts that they fire on",
        },
    }


def rounded(array):
    """A list of numbers of four decimals."""
    return np.round(array, 4).tolist()


def invented_grades(rng, neurons, lengths):
    """Grades beside controls by number of texts, [neurons][lengths] of (grade, control, better)."""
    control = rng.uniform(0.1, 0.4, (neurons, 1)) + 0.05 * np.arange(len(lengths))
    grade = control + rng.uniform(-0.1, 0.4, control.shape)
    grade[:4] = control[:4] + 0.2  # the first neurons are better than noise
    return np.round(np.stack([grade, control, grade > control + 0.1], axis=-1), 4).tolist()


def invented_layer(rng, about, graded):
    """The columns of a layer's neurons; all texts of each side; grades by number of texts."""
    neurons = about["neurons"]
    sides = {
        name: invented_side(rng, neurons, about["components"], len(about["texts"]))
        for name in ("writes", "fires_on")
    }
    for ids, _ in sides.values():  # the first neurons have the texts that the tests look for
        ids[:4, 0] = range(4)
    columns = {
        "explained": rounded(rng.uniform(0.1, 0.9, neurons)),
        "norm": rounded(rng.gamma(2, 0.3, neurons)),
        "threshold": rounded(rng.uniform(0.2, 0.4, neurons)),
        "rotated": {"rotated_fires_on": {"pearson": 0.7, "auprc": 0.3}} if graded else {},
        "rotated_by_length": {"fires_on": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]} if graded else {},
        "blind": {"fires_on": ["pearson"]} if graded else {},
        "pictures": {
            "split": "train",
            "rows": rng.integers(0, about["splits"]["train"]["count"], neurons * 4).tolist(),
        },
    }
    by_length = {name: invented_grades(rng, neurons, LENGTHS) for name in sides if graded}
    for name, (ids, values) in sides.items():
        m = {None: 16, "noise": 0}.get(graded, JUSTIFIED[name])
        ids, values = ids[:, :m].copy(), values[:, :m]
        columns[name] = {"shown": m}
        if graded:
            judged = {"lengths": LENGTHS, "justified": m, "better": 3, "chance": 4, "controls": 5}
            columns[name]["judged"] = judged
        if graded == "over noise":
            at_m = np.array(by_length[name])[:, LENGTHS.index(m)]
            ids[at_m[:, 2] == 0] = -1
            judged["better"] = int(at_m[:, 2].sum())
            columns[name] |= dict(zip(("grade", "control", "better"), at_m.T.tolist(), strict=True))
        columns[name] |= {"texts": ids.ravel().tolist(), "coefficients": values.ravel().tolist()}
    if graded:
        by_length["wpmi"] = invented_grades(rng, neurons, [1])
    return columns, sides, by_length


def invented_index(rng, count, n_texts, neurons):
    """The neurons that fire most on each text."""
    ids = rng.integers(0, neurons, (n_texts, count)).astype("<u2")
    return {
        "count": count,
        "neurons": packed(ids),
        "correlations": packed(rng.integers(0, 120, ids.shape).astype(np.int8)),
    }


def invented_picture(rng, about, split, sign):
    """One of the images of the largest effects."""
    fires = np.clip(rng.normal(60, 90, size=about["grid"]), 0, 255).astype(np.uint8)
    return [
        int(rng.integers(about["splits"][split]["count"])),
        round(sign * float(rng.gamma(4, 0.1)), 4),
        packed(fires),
    ]


def invented_neuron(rng, about, columns, sides, by_length, n):
    """Everything about neuron `n`."""
    counts = {split: value["count"] for split, value in about["splits"].items()}
    near = rng.integers(0, about["neurons"], 8)
    classes = rng.permutation(len(about["class_names"])) if about["classifier"] else []
    detail = {
        "grades": {
            row: {
                measure: round(float(rng.uniform(-0.1, 0.9)), 3)
                for measure in ("pearson", "auprc", "pearson_without", "auprc_without", "drop")
            }
            for row in about["rows"]
            if not row.startswith("rotated")
        },
        "by_length": {name: rows[n] for name, rows in by_length.items()},
        "shown": {},
        "auprc_chance": 0.02,
        "top": {
            split: {
                name: [invented_picture(rng, about, split, sign) for _ in range(8)]
                for name, sign in (("positive", 1), ("negative", -1))
            }
            for split in counts
        },
        "histogram": {"edges": [-1.0, 1.0]},
        "threshold": columns["threshold"][n],
        "heads": [
            *([int(rng.integers(9, 12)), int(rng.integers(12)), 0.3 / (i + 1)] for i in range(7)),
            [-1, 3, -0.04],
        ],
        "without": None,
        "for": [[int(c), 0.04 - 0.01 * i] for i, c in enumerate(classes[:4])],
        "against": [[int(c), -0.04 + 0.01 * i] for i, c in enumerate(classes[4:])],
        "nearest": [
            [int(rng.choice(about["layers"])), int(m), round(0.9 - 0.05 * i, 3)] for i, m in enumerate(near)
        ],
    }
    if n % 2:
        falls = [
            [int(t), 0.5 / (i + 1)] for i, t in enumerate(rng.choice(len(about["texts"]), 4, replace=False))
        ]
        detail["without"] = {"agreement": 0.94, "null": -0.01, "falls": falls, "rises": falls[::-1]}
    for split, count in counts.items():
        detail["histogram"][split] = np.histogram(rng.normal(0, 0.2, 10 * count), 40, (-1, 1))[0].tolist()
    for name, side in sides.items():
        detail[name] = [[int(i), float(value)] for i, value in zip(side[0][n], side[1][n], strict=True)]
        if "judged" in columns[name]:
            better = columns[name].get("better", {n: 0})[n]
            detail["shown"][name] = detail[name][: columns[name]["shown"]] if better else []
    return detail


def invented_image(rng, about):
    """The active neurons of an image, and its concepts."""
    neurons = rng.permutation(about["neurons"])[:30]
    image = {"neurons": [[int(n), round(2 / (i + 1), 3)] for i, n in enumerate(neurons)]}
    for form in ("fires_on", "writes", "nearest"):
        words = rng.permutation(len(about["texts"]))[:8]
        image[form] = [[int(w), round(1 / (i + 1), 3)] for i, w in enumerate(words)]
    return image


def invented_gallery(
    folder,
    *,
    layers=(8, 9),
    neurons=130,
    counts=None,
    texts=None,
    components=20,
    graded="over noise",
    plain=False,
    seed=0,
):
    """Write a gallery of random numbers and return its folder; a `plain` one has no pictures and classes.

    graded: "over noise"; "noise" where no length is justified; None without controls.
    """
    from jinja2 import Environment, FileSystemLoader

    rng = np.random.default_rng(seed)
    counts = counts or {"train": 300, "val": 60}
    (folder / "data").mkdir(parents=True)
    environment = Environment(loader=FileSystemLoader(GALLERY), autoescape=True)
    page = environment.get_template("gallery.html").render(title="Neurons of ViT-B-32", many="neurons")
    (folder / "index.html").write_text(page, encoding="utf-8")
    for name in ("gallery.css", "gallery.js"):
        shutil.copy(GALLERY / name, folder / name)

    def give(path, key, value):
        """Write a data file."""
        target = folder / "data" / f"{path}.js"
        target.parent.mkdir(exist_ok=True)
        target.write_text(f"gallery.receive({json.dumps(key)}, {json.dumps(value)});\n", encoding="utf-8")

    about = invented_about(rng, layers, neurons, counts, texts, components, plain)
    give("about", "about", about)
    if not plain:
        (folder / "pictures").mkdir()
        for split, count in counts.items():
            invented_images(rng, folder / "pictures", split, count, about["sheet"])
    for layer in layers:
        columns, sides, by_length = invented_layer(rng, about, graded)
        give(f"{layer}/layer", f"layer {layer}", columns)
        give(
            f"{layer}/texts",
            f"texts {layer}",
            invented_index(rng, 3, len(about["texts"]), neurons),
        )
        if not plain:
            table = rng.integers(-127, 128, size=(len(about["class_names"]), neurons)).astype(np.int8)
            classes = {"scale": rounded(rng.uniform(0.01, 0.05, len(table))), "values": packed(table)}
            give(f"{layer}/classes", f"classes {layer}", classes)
        chunk = about["neuron_chunk"]
        for first in range(0, neurons, chunk):
            some = [
                invented_neuron(rng, about, columns, sides, by_length, n)
                for n in range(first, min(first + chunk, neurons))
            ]
            give(
                f"{layer}/neurons_{first // chunk}",
                f"neurons {layer} {first // chunk}",
                {"first": first, "neurons": some},
            )
        chunk = about["image_chunk"]
        for split, count in counts.items():
            for first in range(0, count, chunk):
                some = [invented_image(rng, about) for _ in range(min(chunk, count - first))]
                number = first // chunk
                give(
                    f"{layer}/images_{split}_{number}",
                    f"images {layer} {split} {number}",
                    {"first": first, "images": some},
                )
    return folder
