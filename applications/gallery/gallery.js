// The gallery of neurons, or of other units (docs/units.md), which code calls neurons, too. Data come as scripts that call gallery.receive, for fetch() does not work on file://.
// Names of classes and texts are foreign: they enter the page as text nodes and attributes only.
"use strict";
(() => {
  const FIRST = 16; // cards that are drawn at once; the others follow as one scrolls
  const BATCH = 36;
  const TEXTS = 12; // texts of a side that is not graded, before one asks for all
  const CLASS_SORTS = ["for", "against"];
  const SIDES = { fires_on: "fires on", writes: "writes" };
  const titles = { fires_on: "Fires on", writes: "Writes" };
  const ALONE = 2; // in place of a side: a text that is in no description, but alone predicts a neuron's effects
  const byId = (id) => document.getElementById(id);
  const main = byId("main");
  const siteTitle = document.title;
  let about;
  let [one, many] = ["neuron", "neurons"]; // words for what it is a page of
  const capital = (text) => text[0].toUpperCase() + text.slice(1);

  // ---- data ----

  const received = new Map();
  const loading = new Map();
  window.gallery = { receive: (key, value) => void received.set(key, value) };

  function load(key, path) {
    if (!loading.has(key)) {
      loading.set(key, new Promise((resolve, reject) => {
        const script = element("script", { src: path });
        script.onload = () => (received.has(key) ? resolve(received.get(key)) : script.onerror());
        script.onerror = () => {
          loading.delete(key); // so that another visit tries again
          reject(new Error(`The file ${path} is missing or damaged.`));
        };
        document.head.append(script);
      }));
    }
    return loading.get(key);
  }

  const prepared = new Map();
  async function loadLayer(number) {
    const data = await load(`layer ${number}`, `data/${number}/layer.js`);
    if (!prepared.has(number)) prepared.set(number, prepareLayer(number, data));
    return prepared.get(number);
  }

  async function loadClasses(number) {
    const data = await load(`classes ${number}`, `data/${number}/classes.js`);
    data.table ??= new Int8Array(bytes(data.values).buffer);
    return data;
  }

  async function loadPiece(key, folder, index, size) {
    const chunk = Math.floor(index / size);
    const data = await load(`${key} ${chunk}`, `data/${folder}_${chunk}.js`);
    return (data.neurons ?? data.images)[index - data.first];
  }

  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

  const sheets = new Map();
  function loadSheet(path) {
    if (!sheets.has(path)) {
      sheets.set(path, new Promise((resolve, reject) => {
        const image = new Image();
        image.onload = () => resolve(image);
        image.onerror = () => reject(new Error(`The file ${path} is missing or damaged.`));
        image.src = path;
      }));
    }
    return sheets.get(path);
  }

  // ---- search ----

  function prepareLayer(number, data) {
    const sides = Object.keys(SIDES).map((name) => ({ name, ...data[name] }));
    return { number, count: data.explained.length, sides, ...data };
  }

  async function loadSearch(layer) {
    const index = await load(`texts ${layer.number}`, `data/${layer.number}/texts.js`);
    return (layer.search ??= prepareSearch(layer, index));
  }

  // What the description of a neuron has over noise; 1 where no description is graded, null where this one is not.
  const overNoise = ({ grade, control }, neuron) => (!grade ? 1 : known(grade[neuron]) ? grade[neuron] - control[neuron] : null);

  // Units that act on few images are not graded.
  const isRare = (layer, neuron) => layer.acts !== undefined && layer.acts[neuron] < about.units.least;
  const actsOn = (layer, neuron) => `acts on ${grouped(layer.acts[neuron])} training image${layer.acts[neuron] === 1 ? "" : "s"}`;

  // A pair of a neuron and a head is unit k N + n, head k of those after the layer.
  function pairOf(layer, neuron) {
    const heads = about.units?.heads[layer];
    return heads ? { neuron: neuron % about.units.paired, head: heads[Math.floor(neuron / about.units.paired)] } : null;
  }
  function nameOf(layer, neuron) {
    const pair = pairOf(layer, neuron);
    return `${one} ${neuron}${pair ? `: neuron ${pair.neuron} through ${headLayer(...pair.head)}` : ""}`;
  }

  // Everything that a key stroke needs is made once here: lower-cased texts, and the entries of each text, (neuron, side, strength).
  // An entry is a text that a neuron's card shows, or one of the neurons whose effects a text predicts best. The strength of the
  // first is its share of the largest coefficient times grade over control, that of the second the correlation.
  function prepareSearch(layer, index) {
    const correlations = new Int8Array(bytes(index.correlations).buffer);
    const numbers = bytes(index.neurons);
    const neurons = numbers.length === 2 * correlations.length ? new Uint16Array(numbers.buffer) : new Uint32Array(numbers.buffer);
    const first = new Int32Array(about.texts.length + 1); // where the entries of a text begin, once they are sorted by text
    for (let t = 0; t < about.texts.length; t++) first[t + 1] = index.count;
    for (const { texts } of layer.sides) for (const text of texts) if (text >= 0) first[text + 1]++;
    for (let t = 0; t < about.texts.length; t++) first[t + 1] += first[t];
    const total = first.at(-1);
    const search = { first, neuron: new Int32Array(total), side: new Uint8Array(total), strength: new Float32Array(total) };
    const place = first.slice(0, -1);
    const add = (text, neuron, side, strength) => {
      const at = place[text]++;
      search.neuron[at] = neuron;
      search.side[at] = side;
      search.strength[at] = strength;
    };
    const noise = layer.sides[0].judged && !layer.sides[0].judged.justified; // where any text predicts effects
    for (let i = 0; i < neurons.length; i++) add(Math.floor(i / index.count), neurons[i], ALONE, noise ? -1 : Math.max(correlations[i] / 127, 0));
    layer.sides.forEach((side, place) => {
      const { texts, coefficients, shown } = side;
      for (let i = 0; i < texts.length; i++) {
        if (texts[i] < 0) continue;
        const neuron = Math.floor(i / shown);
        const largest = Math.abs(coefficients[neuron * shown]) || 1;
        add(texts[i], neuron, place, Math.max(Math.abs(coefficients[i] / largest) * overNoise(side, neuron), 0));
      }
    });
    search.words = about.texts.map((text) => text.toLowerCase());
    return search;
  }

  const wordCharacter = /[\p{L}\p{N}]/u;
  function matchLevel(text, query) {
    let at = text.indexOf(query);
    if (at < 0) return 0;
    if (text.length === query.length) return 3;
    for (; at >= 0; at = text.indexOf(query, at + 1)) if (at === 0 || !wordCharacter.test(text[at - 1])) return 2;
    return 1;
  }

  // The score of each neuron, 0 where nothing matches, and the text and the side that gave it. Descriptions come before texts alone.
  function searchLayer(layer, search, query) {
    const score = new Float32Array(layer.count);
    const text = new Int32Array(layer.count).fill(-1);
    const side = new Uint8Array(layer.count);
    const strength = new Float32Array(layer.count);
    for (let t = 0; t < search.words.length; t++) {
      const level = matchLevel(search.words[t], query);
      if (!level) continue;
      for (let i = search.first[t]; i < search.first[t + 1]; i++) {
        const neuron = search.neuron[i];
        if (search.strength[i] < 0) continue;
        const value = (search.side[i] === ALONE ? 0 : 8) + 2 * level + search.strength[i];
        if (value > score[neuron]) {
          score[neuron] = value;
          text[neuron] = t;
          side[neuron] = search.side[i];
          strength[neuron] = search.strength[i];
        }
      }
    }
    if (/^\d+$/.test(query) && Number(query) < layer.count) {
      const paired = about.units?.heads[layer.number] && Number(query) < about.units.paired; // the pairs of a neuron
      for (let n = Number(query); n < layer.count; n += paired ? about.units.paired : layer.count) score[n] = Infinity;
    }
    return { score, text, side, strength };
  }

  // The index of texts comes while nobody waits for it: after the grid, or when the search is chosen.
  const prepareSoon = (layer) => (window.requestIdleCallback ?? setTimeout)(() => loadSearch(layer).catch(() => null));

  const normalize = (query) => query.trim().toLowerCase();

  // ---- order ----

  function sortKeys(layer, hasQuery) {
    const keys = [];
    if (hasQuery) keys.push(["match", "best match"]);
    for (const [name, title] of Object.entries(SIDES)) if (layer[name].grade) keys.push([name, `${title}: over noise`]);
    if (!about.units?.heads[layer.number]) keys.push(["explained", "share explained"]); // that of a pair is 1
    keys.push(["norm", "largest norm"], ["number", "number"]);
    if (layer.acts) keys.push(["acts", "images on which it acts"]);
    if (about.classifier !== false && about.class_names.length) keys.push(["for", "speaks for a class"], ["against", "speaks against a class"]);
    return keys;
  }

  function chosenSort(layer, place) {
    const keys = sortKeys(layer, normalize(place.q) !== "");
    return { keys, sort: keys.some(([key]) => key === place.sort) ? place.sort : keys[0][0] };
  }

  function sortColumn(layer, sort, found, classes, label) {
    if (sort === "match") return found.score;
    if (["explained", "norm", "acts"].includes(sort)) return layer[sort];
    if (Object.hasOwn(SIDES, sort)) return layer[sort].grade.map((_, neuron) => overNoise(layer[sort], neuron));
    if (classes) {
      const sign = sort === "for" ? 1 : -1;
      return classes.table.subarray(label * layer.count, (label + 1) * layer.count).map((value) => sign * value);
    }
    return new Array(layer.count).fill(0);
  }

  function orderNeurons(column, found, count) {
    const value = Float64Array.from({ length: count }, (_, i) => column[i] ?? -Infinity);
    let neurons = Array.from({ length: count }, (_, i) => i);
    if (found) {
      neurons = neurons.filter((i) => found.score[i] > 0);
      for (const i of neurons) if (found.score[i] === Infinity) value[i] = Infinity; // a number comes first in any order
    }
    return neurons.sort((a, b) => (value[a] === value[b] ? a - b : value[b] > value[a] ? 1 : -1));
  }

  // ---- elements ----

  function build(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
    node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }
  const element = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
  const drawing = (tag, attributes = {}, ...children) =>
    build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  const known = (x) => typeof x === "number" && Number.isFinite(x);
  const decimals = (x, digits = 2) => (known(x) ? x.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−") : "–");
  const signed = (x, digits = 2) => (known(x) && x > 0 ? "+" : "") + decimals(x, digits);
  const percent = (x) => (known(x) ? `${Math.round(100 * x)} %`.replace("-", "−") : "–");
  const grouped = (x) => x.toLocaleString("en");
  const figures = (x, digits = 3) => (known(x) ? String(Number(x.toPrecision(digits))).replace("-", "−") : "–"); // as the data have them
  const signedFigures = (x) => (known(x) && x > 0 ? "+" : "") + figures(x);
  const digitsFor = (values) => { // enough decimals for two figures of the largest
    const largest = Math.max(...values.map(Math.abs).filter(known), 0);
    return largest > 0 ? Math.min(6, Math.max(2, 1 - Math.floor(Math.log10(largest)))) : 2;
  };
  const headLayer = (layer, head) => (layer < 0 ? `pooling attention, head ${head}` : `layer ${layer}, head ${head}`);
  const className = (split, row) => about.class_names[about.splits[split].labels[row]] ?? about.splits[split].files?.[row] ?? "no class";

  function sheetPlace(split, row) {
    const { columns, rows, size } = about.sheet;
    const place = row % (columns * rows);
    const path = `pictures/${encodeURIComponent(split)}_${Math.floor(row / (columns * rows))}.jpg`;
    return { path, size, column: place % columns, row: Math.floor(place / columns) };
  }

  // Signed bars of one list: they start in the middle when some values are below zero.
  function barList(items, label, format = signed) {
    const values = items.map(([, value]) => value);
    const largest = Math.max(...values.map(Math.abs), 1e-12);
    const below = values.some((value) => value < 0);
    const digits = digitsFor(values);
    return element("ul", { class: "bars", "aria-label": label }, items.map(([node, value]) => {
      const fill = element("i", { class: value < 0 ? "below" : "above" });
      const width = (Math.abs(value) / largest) * (below ? 50 : 100);
      fill.style.width = `${width}%`;
      fill.style.left = `${!below ? 0 : value < 0 ? 50 - width : 50}%`;
      const bar = element("span", { class: below ? "bar signed" : "bar", "aria-hidden": "true" }, fill);
      return element("li", {}, node, bar, element("span", {}, format(value, digits)));
    }));
  }

  function section(title, note, ...content) {
    return element("section", {}, element("h2", {}, title), element("p", { class: "note" }, note), ...content);
  }

  const link = (address, ...content) => element("a", { href: address }, ...content);

  // ---- cards ----

  function highlighted(text, query) {
    const at = query ? text.toLowerCase().indexOf(query) : -1;
    if (at < 0) return [text];
    return [text.slice(0, at), element("mark", {}, text.slice(at, at + query.length)), text.slice(at + query.length)];
  }

  // A bar from 0 to 1: the grade, solid where it is over the control, with a mark at the control.
  function meter(grade, control, better) {
    const within = (x) => 100 * Math.min(Math.max(x, 0), 1);
    const bar = (name, from, to) => {
      const part = element("i", { class: name });
      part.style.left = `${from}%`;
      part.style.width = `${Math.max(to - from, 0)}%`;
      return part;
    };
    const [end, mark] = [within(grade), within(control)];
    return element("span", { class: better ? "meter better" : "meter", "aria-hidden": "true" },
      bar("noise", 0, Math.min(end, mark)), bar("over", mark, end), bar("control", mark, mark));
  }

  // The three strongest texts of a side; the one that the search found takes the last place when it is not among them.
  function cardSide(layer, neuron, place, match, query) {
    const { name, texts, coefficients, shown, judged, grade, control, better } = layer.sides[place];
    const first = neuron * shown;
    const lines = [];
    for (let i = first; i < first + Math.min(3, shown); i++) if (texts[i] >= 0) lines.push([texts[i], coefficients[i] < 0]);
    const found = match && (match.side === ALONE ? 0 : match.side) === place ? match.text : -1;
    const says = lines.length > 0;
    if (found >= 0 && match.side === ALONE) {
      lines.push([found, false, "not described by: "]);
    } else if (found >= 0 && !lines.some(([text]) => text === found)) {
      lines.splice(2, 1, [found, coefficients[texts.indexOf(found, first)] < 0]);
    }
    const isGraded = grade && !isRare(layer, neuron);
    const number = isGraded ? `${decimals(grade[neuron])} (${decimals(control[neuron])})` : judged ? "" : "not graded";
    const silent = isRare(layer, neuron) ? "not graded" : "no better than noise";
    const items = lines.map(([id, isMinus, alone]) => {
      const text = about.texts[id];
      const minus = isMinus ? element("span", { class: "minus" }, "− ") : null;
      const label = alone ? element("span", { class: "alone" }, alone) : null;
      return element("li", { title: text }, minus, label, id === found ? highlighted(text, query) : text);
    });
    return element("div", {},
      element("div", { class: "label" }, SIDES[name], element("span", { class: "number" }, number)),
      isGraded && meter(grade[neuron], control[neuron], better[neuron]),
      judged && !says ? element("div", { class: "none" }, silent) : null,
      element("ul", {}, items));
  }

  function thumbnail(split, row) {
    const thumb = element("span", { class: "thumb", role: "img", "aria-label": className(split, row) });
    const place = sheetPlace(split, row);
    thumb.style.backgroundImage = `url("${place.path}")`;
    thumb.style.setProperty("--column", place.column);
    thumb.style.setProperty("--row", place.row);
    return thumb;
  }

  function card(layer, neuron, { heading = "h2", match = null, query = "", extra = null } = {}) {
    const { split, rows } = layer.pictures;
    const four = Array.from(rows.slice(4 * neuron, 4 * neuron + 4)).filter((row) => row >= 0);
    return element("li", { class: "card" },
      element("div", { class: "head" },
        element(heading, {}, link(`#${layer.number}/${neuron}`, capital(nameOf(layer.number, neuron)))),
        element("span", { class: "number" }, extra ?? `explained ${percent(layer.explained[neuron])}, norm ${figures(layer.norm[neuron])}`)),
      isRare(layer, neuron) ? element("p", { class: "none" }, actsOn(layer, neuron)) : null,
      about.sheet && element("div", { class: "thumbs" }, four.map((row) => thumbnail(split, row))),
      element("div", { class: "side" }, [0, 1].map((side) => cardSide(layer, neuron, side, match, query))));
  }

  // A list of cards that grows when its end comes near.
  let growing = null;
  function cardList(label, items, makeCard) {
    const list = element("ul", { class: "cards", role: "list", "aria-label": label });
    const end = element("div", { class: "sentinel" });
    const observer = new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && more(), { rootMargin: "400px" });
    function more(count = BATCH) {
      const from = list.childElementCount;
      list.append(...items.slice(from, from + count).map(makeCard));
      observer.disconnect();
      if (list.childElementCount < items.length) observer.observe(end); // observed again, so that it reports once more
      return list.childElementCount > from;
    }
    more(FIRST);
    growing = { list, more, stop: () => observer.disconnect() };
    return [list, end];
  }

  // ---- addresses ----

  function parse(hash) {
    const [path, query = ""] = hash.replace(/^#/, "").split(/\?(.*)/s);
    const parts = path.split("/");
    const number = (text, limit) => (/^\d{1,9}$/.test(text) && Number(text) < limit ? Number(text) : null);
    const layerOf = (text) => about.layers.find((layer) => String(layer) === text) ?? null;
    if (parts[0] === "image" && (parts.length === 3 || parts.length === 4)) {
      const split = Object.keys(about.splits).find((name) => encodeURIComponent(name) === parts[1] || name === parts[1]) ?? null;
      const row = split === null ? null : number(parts[2], about.splits[split].count);
      const layer = parts.length === 4 ? layerOf(parts[3]) : about.layers.at(-1);
      return row === null || layer === null ? null : { view: "image", split, row, layer };
    }
    const layer = path === "" ? about.layers[0] : layerOf(parts[0]);
    if (layer === null || parts.length > 2) return null;
    if (parts.length === 2) {
      const neuron = number(parts[1], about.neurons);
      return neuron === null ? null : { view: "neuron", layer, neuron };
    }
    const fields = new URLSearchParams(query);
    return {
      view: "grid", layer, q: fields.get("q") ?? "", sort: fields.get("sort") ?? "",
      label: number(fields.get("class") ?? "", about.class_names.length),
    };
  }

  const imageAddress = (split, row, layer) => `#image/${encodeURIComponent(split)}/${row}/${layer}`;

  function gridAddress({ layer, q = "", sort = "", label = null }) {
    const fields = new URLSearchParams();
    if (q) fields.set("q", q);
    if (sort) fields.set("sort", sort);
    if (label !== null) fields.set("class", label);
    return `#${layer}${String(fields) ? `?${fields}` : ""}`;
  }

  // ---- the grid ----

  async function showGrid(place, isCurrent) {
    const layer = await loadLayer(place.layer);
    const query = normalize(place.q);
    const { sort } = chosenSort(layer, place);
    const wantsClass = CLASS_SORTS.includes(sort);
    const classes = wantsClass && place.label !== null ? await loadClasses(place.layer) : null;
    const search = query ? await loadSearch(layer) : null;
    if (!isCurrent()) return false;
    if (!query) prepareSoon(layer);

    const found = query ? searchLayer(layer, search, query) : null;
    const neurons = orderNeurons(sortColumn(layer, sort, found, classes, place.label), found, layer.count);
    const makeCard = (neuron) => {
      let extra = null;
      if (classes) {
        const value = (classes.table[place.label * layer.count + neuron] * classes.scale[place.label]) / 127;
        extra = `${about.class_names[place.label]} ${signed(value, digitsFor([classes.scale[place.label]]))}`;
      }
      return card(layer, neuron, { match: found && { text: found.text[neuron], side: found.side[neuron], strength: found.strength[neuron] }, query, extra });
    };
    growing?.stop();
    const all = `${grouped(layer.count)} ${many}`;
    let status = `${all}.`;
    if (found) {
      const byText = neurons.filter((neuron) => found.text[neuron] >= 0);
      const alone = byText.filter((neuron) => found.side[neuron] === ALONE).length;
      status = `${grouped(neurons.length)} of ${all} match`;
      if (byText.length) status += `: ${grouped(byText.length - alone)} by their descriptions`;
      status += alone ? `, ${grouped(alone)} only because the text predicts their effects.` : ".";
    }
    if (wantsClass && !classes) status += " Choose a class.";
    byId("status").textContent = status;
    main.replaceChildren(
      element("h1", { tabindex: "-1" }, `Layer ${layer.number}`),
      element("p", { class: "note" }, `Each card is ${whatItIs(layer.number)}: images of its largest effects, when it acts (fires on) `,
        "and what it adds to the image's representation (writes)."),
      claim(layer),
      ...cardList(`${capital(many)} of layer ${layer.number}`, neurons, makeCard));
    return `Layer ${layer.number}`;
  }

  function whatItIs(layer) {
    if (!about.units) return "a neuron of the layer's MLP";
    const { kind, site, heads } = about.units;
    return heads[layer] ? "a neuron of the layer's MLP, seen through one later head" : `one of the ${kind}, which write ${site[layer]} of layer ${layer}`;
  }

  const textsAre = (count) => (count === 1 ? "1 text is" : `${count} texts are`);

  // What so few images cannot say; null where there are enough.
  function fewImages() {
    const said = [];
    if (about.graded_images && about.graded_images < 200) {
      said.push(`Graded on ${grouped(about.graded_images)} held-out images only: the correlation of a single ${one} has a standard error of up to ${decimals(1 / Math.sqrt(about.graded_images))}.`);
    }
    if (about.k < 20) said.push(`A direction is that of the ${grouped(about.k)} largest effects only.`);
    return said.length ? element("p", { class: "note few" }, element("strong", {}, "Few images. "), said.join(" ")) : null;
  }

  // What the layer's descriptions have over noise: a line for each side.
  function claim(layer) {
    const sides = layer.sides.filter(({ judged }) => judged);
    if (!sides.length) {
      return element("p", { class: "claim empty" }, element("strong", {}, "Not graded:"),
        " these texts were not compared with random directions, as evaluate_descriptions.py does.");
    }
    const none = sides.every(({ judged }) => !judged.justified);
    const rare = layer.acts ? layer.acts.filter((_, neuron) => isRare(layer, neuron)).length : 0;
    const lines = sides.map((side) => {
      const { justified, better, chance } = side.judged;
      const share = `${grouped(better)} of ${grouped(layer.count - rare)} ${rare ? `graded ${many}` : many}`;
      const says = justified
        ? [element("strong", {}, share), ` have a description better than noise; by chance ${grouped(chance)} would. ${textsAre(justified)} justified.`]
        : [none ? "" : element("strong", {}, `no text names these ${many}: `), `at most ${share} pass as better than noise; by chance ${grouped(chance)} would.`];
      return element("li", {}, `${titles[side.name]}: `, says);
    });
    const heading = none ? element("p", {}, element("strong", {}, `No text names these ${many}:`),
      " their descriptions say no more about them than random directions do.") : null;
    const legend = none ? null : element("p", { class: "note" }, meter(0.7, 0.45, true),
      " Bars: the grade, blue where it is better than noise; the mark, and the number in brackets, is the control: random directions in place of the texts. "
      + "Fires on: correlation with the effects on held-out images. Writes: share of the direction that the texts rebuild.");
    const few = rare ? element("p", { class: "note" }, `${grouped(rare)} of ${grouped(layer.count)} ${many} act on fewer than ${about.units.least} training images, and are not graded.`) : null;
    return element("div", { class: none ? "claim empty" : "claim" }, heading, element("ul", {}, lines), few, fewImages(), legend);
  }

  async function showControls(place) {
    const { keys, sort } = chosenSort(await loadLayer(place.layer), place);
    byId("sort").replaceChildren(...keys.map(([key, title]) => element("option", { value: key }, title)));
    byId("sort").value = sort;
    byId("class-field").hidden = !CLASS_SORTS.includes(sort);
    if (byId("search").value !== place.q) byId("search").value = place.q;
    if (document.activeElement !== byId("class")) byId("class").value = place.label === null ? "" : classTitles[place.label];
  }

  // ---- a neuron ----

  async function showNeuron(place, isCurrent) {
    const layer = await loadLayer(place.layer);
    if (place.neuron >= layer.count) throw new Error("There is no such page.");
    const detail = await loadPiece(`neurons ${place.layer}`, `${place.layer}/neurons`, place.neuron, about.neuron_chunk);
    if (!isCurrent()) return false;
    const name = `Layer ${place.layer}, ${nameOf(place.layer, place.neuron)}`;
    const neighbour = (neuron, title, rel) =>
      neuron >= 0 && neuron < layer.count ? element("a", { href: `#${place.layer}/${neuron}`, rel }, title) : null;
    byId("status").textContent = "";
    const top = element("div", { class: "top" },
      element("h1", { tabindex: "-1" }, name),
      element("nav", { "aria-label": "Neighbours" },
        neighbour(place.neuron - 1, "← previous", "prev"), link(gridOf(place.layer), "grid"), neighbour(place.neuron + 1, "next →", "next")));
    if (layer.acts?.[place.neuron] === 0) {
      main.replaceChildren(top, element("p", { class: "note" }, `It is ${whatItIs(place.layer)}. Not graded: it ${actsOn(layer, place.neuron)}, so it has no direction, and no text.`));
      return name;
    }
    main.replaceChildren(
      top,
      element("p", { class: "note" }, about.units ? `It is ${whatItIs(place.layer)}. ` : "",
        `One direction explains ${percent(layer.explained[place.neuron])} of this ${one}'s largest effects `,
        `on the image's representation. Their mean norm is ${figures(layer.norm[place.neuron])}.`,
        layer.acts ? ` It ${actsOn(layer, place.neuron)}.` : ""),
      pictureSection(layer, detail.top),
      element("div", { class: "columns" }, layer.sides.map((side) => textSection(layer, place.neuron, detail, side))),
      element("div", { class: "columns" }, histogramSection(detail), headSection(detail)),
      detail.without ? withoutSection(place.layer, detail.without) : "",
      detail.for.length || detail.against.length ? classSection(place.layer, detail) : "",
      section(`Nearest ${many}`, `${capital(many)} whose directions are most alike, by cosine.`,
        barList(detail.nearest.map(([l, n, cosine]) => [link(`#${l}/${n}`, `layer ${l}, ${nameOf(l, n)}`), cosine]), `Nearest ${many}`)));
    return name;
  }

  // A unit does not act on most images, and they all have the same effect: these would be the first of the data set.
  const isRest = (pictures) => pictures.length > 1 && pictures.every(([, value, map]) => value === pictures[0][1] && /^A+=*$/.test(map)); // base64 of zeros

  function pictureSection(layer, top) {
    const redraws = [];
    const rows = Object.keys(about.splits).filter((split) => Object.hasOwn(top, split)).flatMap((split) =>
      ["positive", "negative"].filter((sign) => top[split][sign]?.length).map((sign) => element("div", {},
        element("h3", {}, `${split}, ${sign} effects`),
        layer.acts && isRest(top[split][sign])
          ? element("p", { class: "note" }, `${signedFigures(top[split][sign][0][1])} on every image on which it does not act, and none further that way.`)
          : element("ul", { class: "pictures", "aria-label": `${split}, largest ${sign} effects` },
            top[split][sign].map((picture) => element("li", {}, topPicture(layer.number, split, picture, redraws)))))));
    const toggle = about.sheet && element("button", { type: "button", "aria-pressed": "true" }, "Show where it fires");
    toggle?.addEventListener("click", () => {
      const shows = toggle.getAttribute("aria-pressed") !== "true";
      toggle.setAttribute("aria-pressed", String(shows));
      for (const redraw of redraws) redraw(shows);
    });
    return section("Images of its largest effects", `Images on which the ${one} moves the representation furthest along its direction, either way. `
      + (about.sheet ? `Dark patches are those where ${pairOf(layer.number, 0) ? "its neuron" : `the ${one}`} does not fire.` : ""), toggle, element("div", { class: "columns" }, rows));
  }

  function topPicture(layer, split, [row, projection, map], redraws) {
    const name = className(split, row);
    const words = [element("span", { title: name }, name), element("span", { class: "number" }, signedFigures(projection))];
    if (!about.sheet) return link(imageAddress(split, row, layer), ...words);
    const canvas = element("canvas", { role: "img", "aria-label": `${name}, projection ${signedFigures(projection)}` });
    const redraw = (shows) => drawPicture(canvas, split, row, shows ? map : null);
    redraws.push(redraw);
    redraw(true);
    for (const word of words) word.setAttribute("aria-hidden", "true"); // the canvas says the same
    return link(imageAddress(split, row, layer), canvas, ...words);
  }

  async function drawPicture(canvas, split, row, map) {
    const place = sheetPlace(split, row);
    canvas.map = map;
    const sheet = await loadSheet(place.path).catch(() => null);
    if (!sheet || canvas.map !== map) return;
    canvas.width = canvas.height = place.size;
    const context = canvas.getContext("2d");
    context.drawImage(sheet, place.column * place.size, place.row * place.size, place.size, place.size, 0, 0, place.size, place.size);
    if (map) context.drawImage(shade(map), 0, 0, place.size, place.size); // scaled up bilinearly
    canvas.dataset.drawn = map ? "map" : "plain";
  }

  // One pixel a patch, black, the more opaque the less the neuron fires there.
  function shade(map) {
    const [rows, columns] = about.grid;
    const small = element("canvas", { width: columns, height: rows });
    const pixels = new ImageData(columns, rows);
    bytes(map).forEach((value, i) => (pixels.data[4 * i + 3] = 0.75 * (255 - value)));
    small.getContext("2d").putImageData(pixels, 0, 0);
    return small;
  }

  const NOTES = {
    writes: () => `What the ${one} adds to the image's representation: its direction as a sum of a few texts. Bars: coefficients of the text vectors.`,
    fires_on: () => `When the ${one} acts: texts whose similarity to an image predicts the ${one}'s effect. Bars: coefficients of standardised similarities.`,
  };
  const MEASURED = {
    writes: () => "Share of the direction that texts rebuild",
    fires_on: () => `Correlation with the effect on ${grouped(about.graded_images)} images of ${about.graded_on}`,
  };

  const MEASURES = {
    pearson: "correlation", pearson_without: "correlation without own effect", auprc: "AUPRC", auprc_without: "AUPRC without own effect", drop: "fall when ablated",
  };

  // The texts that are justified, and behind a button the whole description.
  function textSection(layer, neuron, detail, side) {
    const { name, judged, grade, control, better } = side;
    const whole = detail[name];
    const texts = detail.shown[name] ?? whole.slice(0, TEXTS);
    const item = ([id, coefficient]) => [link(gridAddress({ layer: layer.number, q: about.texts[id] }), about.texts[id]), coefficient];
    const list = (entries) => barList(entries.map(item), `Texts: ${SIDES[name]}`);
    const holder = element("div", {}, texts.length ? list(texts) : null);
    const more = texts.length < whole.length ? element("button", { type: "button" }, `More: all ${whole.length} texts`) : null;
    more?.addEventListener("click", () => {
      holder.replaceChildren(list(whole));
      holder.querySelectorAll("a")[texts.length].focus();
      more.remove();
    });
    const isGraded = !isRare(layer, neuron);
    return section(titles[name], NOTES[name](),
      grade && isGraded && element("p", { class: "grade" }, meter(grade[neuron], control[neuron], better[neuron]),
        ` grade ${decimals(grade[neuron])}, control ${decimals(control[neuron])}`),
      holder, element("p", { class: "note" }, reason(layer, side, neuron, whole.length)), more,
      ...(judged && isGraded ? [...lengthTable(layer, detail, side), gradeTable(layer, detail, name)] : []));
  }

  // Why no more texts are shown.
  function reason(layer, { judged, grade, control, better }, neuron, count) {
    if (!judged) return "Not graded: these texts were not compared with random directions.";
    if (isRare(layer, neuron)) return `Not graded: it ${actsOn(layer, neuron)}, and fewer than ${about.units.least} say too little.`;
    const { justified } = judged;
    if (!justified) return "No better than noise: in this layer no number of texts says more than random directions do.";
    if (!better[neuron]) {
      const what = justified === 1 ? "1 text reaches" : `${justified} texts reach`;
      return `No better than noise: ${what} ${decimals(grade[neuron])}, random directions ${decimals(control[neuron])} on average and by chance as much.`;
    }
    if (justified >= count) return `With this pool all ${textsAre(justified)} justified.`;
    return `With this pool ${textsAre(justified)} justified: longer descriptions rebuild the effect, but what they add random directions add too.`;
  }

  const table = (caption, head, rows) => element("table", {},
    element("caption", {}, caption),
    element("thead", {}, element("tr", {}, head.map((title) => (title === "" ? element("td") : element("th", { scope: "col" }, title))))),
    element("tbody", {}, rows));
  const tableRow = (title, cells, own) => element("tr", own ? { class: "own" } : {}, element("th", { scope: "row" }, title),
    cells.map((cell) => element("td", {}, typeof cell === "string" ? cell : decimals(cell))));

  // Grades by number of texts beside their controls, and the measures that are blind. The label by soft-WPMI is one text.
  function lengthTable(layer, detail, { name, judged }) {
    const row = (title, values, own) => tableRow(title, judged.lengths.map((_, i) => values[i] ?? ""), own);
    const compared = (texts, control, found, own) => [
      row(texts, found.map(([grade]) => grade), own),
      row(control, found.map(([, value]) => value)),
      row("better than noise", found.map(([, , better]) => (better ? "yes" : "no"))),
    ];
    const rows = compared("its texts", "control", detail.by_length[name], true);
    if (layer.rotated_by_length[name]) rows.push(row("rotated units, mean of the layer", layer.rotated_by_length[name]));
    if (name === "fires_on") {
      const all = judged.lengths.length - 1;
      if (detail.by_length.wpmi) rows.push(...compared(about.rows.wpmi, "its control", detail.by_length.wpmi));
      rows.push(row(`another ${one}'s texts`, { [all]: detail.grades.null_fires_on.pearson }));
    }
    const caption = `${MEASURED[name]()}, by number of texts. Control: random directions in their place, the mean of ${judged.controls} dictionaries.`;
    const found = table(caption, ["number of texts", ...judged.lengths.map(String)], rows);
    const column = judged.lengths.indexOf(judged.justified);
    if (column >= 0) for (const line of found.querySelectorAll("tr")) line.children[1 + column].classList.add("justified");
    const blind = about.sides[name].filter((of) => Object.hasOwn(layer.blind, of)).map((of) => element("p", { class: "note" },
      `Measures that do not tell ${many} from rotated units (${about.rows[of]}): ${layer.blind[of].map((measure) => MEASURES[measure]).join(", ")}.`));
    return [found, ...blind];
  }

  // All texts of a side by all measures, and what to compare them with.
  function gradeTable(layer, detail, side) {
    const chosen = about.sides[side].filter((name) => Object.hasOwn(detail.grades, name));
    const shown = Object.keys(MEASURES).filter((measure) => Object.hasOwn(detail.grades[chosen[0]], measure));
    const chance = { auprc: detail.auprc_chance, auprc_without: detail.auprc_chance };
    const rotated = chosen.map((name) => `rotated_${name}`).filter((name) => Object.hasOwn(layer.rotated, name));
    const cells = (values) => shown.map((measure) => values[measure]);
    const caption = `How well all texts predict the effect on ${grouped(about.graded_images)} images of ${about.graded_on}: correlation, and AUPRC, the average precision in finding the images of its largest effects. `
      + (shown.includes("drop") ? "Fall when ablated: how much less similar those images are to the texts (× 100) when the effect is replaced by its mean." : "");
    return element("details", {}, element("summary", {}, "Other measures, and other descriptions"),
      table(caption, ["", ...shown.map((measure) => MEASURES[measure])], [
        ...chosen.map((name) => tableRow(about.rows[name], cells(detail.grades[name]), name === side)),
        ...rotated.map((name) => tableRow(about.rows[name], cells(layer.rotated[name]))),
        tableRow("chance", shown.map((measure) => chance[measure] ?? 0)),
      ]));
  }

  function histogramSection({ histogram, threshold }) {
    const [width, height, base] = [600, 160, 135];
    const [from, to] = histogram.edges;
    const x = (value) => ((value - from) / (to - from || 1)) * width;
    const splits = Object.keys(histogram).filter((name) => name !== "edges" && histogram[name]);
    // The square root of the share lets one see the few large effects beside the many small ones.
    const heights = splits.map((split) => {
      const total = histogram[split].reduce((sum, count) => sum + count, 0) || 1;
      return histogram[split].map((count) => Math.sqrt(count / total));
    });
    const largest = Math.max(...heights.flat(), 1e-12);
    const y = (value) => base - (value / largest) * (base - 12);
    const shapes = heights.map((values, i) => {
      const step = width / values.length;
      const path = `M0 ${base}` + values.map((value, j) => `V${y(value).toFixed(1)}H${((j + 1) * step).toFixed(1)}`).join("") + `V${base}`;
      return drawing("path", { d: path, class: i ? "val" : "train" });
    });
    const beyond = splits.map((split) => {
      const total = histogram[split].reduce((sum, count) => sum + count, 0) || 1;
      const step = (to - from) / histogram[split].length;
      const count = histogram[split].reduce((sum, n, i) => sum + (Math.abs(from + (i + 0.5) * step) > threshold ? n : 0), 0);
      return `about ${percent(count / total)} of ${split}`;
    });
    const marks = [-threshold, threshold].filter((value) => value >= from && value <= to);
    const label = (value, anchor) => drawing("text", { x: x(value), y: height - 8, "text-anchor": anchor }, figures(value));
    const plot = drawing("svg", {
      class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `Histogram of signed effects from ${figures(from)} to ${figures(to)}. Beyond ${figures(threshold)} on either side: ${beyond.join(", ")}.`,
    }, shapes, drawing("line", { class: "axis", x1: 0, x2: width, y1: base, y2: base }),
    marks.map((value) => drawing("line", { class: "threshold", x1: x(value), x2: x(value), y1: 4, y2: base })),
    label(from, "start"), label(to, "end"), x(0) > 80 && x(0) < width - 80 ? label(0, "middle") : null);
    const legend = splits.map((split, i) => element("span", {}, element("i", { class: i ? "key val" : "key", "aria-hidden": "true" }), split, "  "));
    return section("How strong its effects are", "Signed effects along the direction over all images; heights are square roots of shares. "
      + `Beyond the dashed lines are the ${grouped(about.k)} largest of the training images.`, plot, element("p", { class: "note" }, legend));
  }

  function withoutSection(layer, { agreement, null: other, texts, falls, rises }) {
    const list = (title, entries) => element("div", {},
      element("h3", {}, title),
      barList(entries.map(([id, value]) => [link(gridAddress({ layer, q: about.texts[id] }), about.texts[id]), value]), title));
    const written = texts ? ` Texts that it writes, ${texts[0]}: ${decimals(texts[1])}; as many random directions: ${decimals(texts[2])}.` : "";
    return section("Without it", `The model run with this ${one} at its mean, on the images where it acts most: texts whose similarity to them (× 100) `
      + `falls and rises most. Its direction says the same of all texts with a correlation of ${decimals(agreement)}; another ${one}'s with ${decimals(other)} on average.${written}`,
      element("div", { class: "columns" }, list("Falls", falls), list("Rises", rises)));
  }

  function headSection({ heads }) {
    const items = heads.map(([layer, head, share]) => [element("span", {}, headLayer(layer, head)), share]);
    return section("Heads that carry it", "Attention heads that bring the effect to the output: signed shares of the effect's variance.",
      barList(items, "Heads", percent));
  }

  function classSection(layer, detail) {
    const lists = [["for", "Speaks for"], ["against", "Speaks against"]].map(([sort, title]) => element("div", {},
      element("h3", {}, title),
      barList(detail[sort].map(([label, value]) => [link(gridAddress({ layer, sort, label }), classTitles[label]), value]), title)));
    return section("Classes", `How the ${one}'s direction moves the scores of the zero-shot classifier. A class leads to the ${many} sorted by it.`,
      element("div", { class: "columns" }, lists));
  }

  // ---- an image ----

  const CONCEPTS = {
    fires_on: () => [titles.fires_on, `What active ${many} fire on: the sum of coefficients times standardised effects.`],
    writes: () => [titles.writes, `What active ${many} write: the sum of coefficients times norms, as published.`],
    nearest: () => [`Nearest texts, without ${many}`, "Cosines with the image's representation."],
  };

  function conceptList(layer, image, form) {
    const [title, note] = CONCEPTS[form]();
    const judged = layer[form]?.judged;
    const items = image[form].map(([id, score]) => [link(gridAddress({ layer: layer.number, q: about.texts[id] }), about.texts[id]), score]);
    return element("div", {}, element("h3", {}, title), element("p", { class: "note" }, note),
      judged && !judged.justified
        ? element("p", { class: "none" }, `No better than noise: no text names the ${many} of this layer.`)
        : barList(items, `Concepts: ${title}`));
  }

  async function showImage({ split, row, layer: number }, isCurrent) {
    const [layer, image] = await Promise.all([
      loadLayer(number), loadPiece(`images ${number} ${split}`, `${number}/images_${encodeURIComponent(split)}`, row, about.image_chunk),
    ]);
    if (!isCurrent()) return false;
    const name = className(split, row);
    const { count, files } = about.splits[split];
    const neighbour = (other, title, rel) =>
      other >= 0 && other < count ? element("a", { href: imageAddress(split, other, number), rel }, title) : null;
    const layers = about.layers.map((l) =>
      element("a", { href: imageAddress(split, row, l), "aria-current": l === number ? "page" : null }, `layer ${l}`));
    const canvas = about.sheet && element("canvas", { class: "large", role: "img", "aria-label": name });
    if (canvas) drawPicture(canvas, split, row, null);
    growing?.stop();
    const digits = digitsFor(image.neurons.map(([, norm]) => norm));
    const makeCard = ([neuron, norm]) => card(layer, neuron, { heading: "h3", extra: `norm here ${decimals(norm, digits)}` });
    byId("status").textContent = "";
    main.replaceChildren(
      element("div", { class: "top" },
        element("h1", { tabindex: "-1" }, `Image ${row} of ${split}: ${name}`),
        element("nav", { "aria-label": "Neighbours" }, neighbour(row - 1, "← previous", "prev"), neighbour(row + 1, "next →", "next"))),
      element("p", { class: "note" }, files?.[row] ?? ""),
      element("div", { class: "pair" },
        element("div", {}, canvas, element("h3", {}, `Show the ${many} of`), element("nav", { "aria-label": "Layers of this image" }, layers)),
        section("Concepts", `Texts for this image: by the active ${many} of layer ${number}, and without ${many}.`,
          element("div", { class: "thirds" }, Object.keys(CONCEPTS).map((form) => conceptList(layer, image, form))))),
      section(`Active ${many} of layer ${number}`, `${capital(many)} with a large effect on this image, the largest first.`,
        ...cardList(`Active ${many} of layer ${number}`, image.neurons, makeCard)));
    return `Image ${row} of ${split}`;
  }

  // ---- going from page to page ----

  let place = null; // what is shown now
  let lastGrid = null;
  let turn = 0;
  const scrolls = new Map();
  let shownHash = null;
  const gridState = (layer) => (lastGrid?.layer === layer ? lastGrid : { layer, q: "", sort: "", label: null });
  const gridOf = (layer) => gridAddress(gridState(layer));

  async function show() {
    const mine = ++turn;
    const isCurrent = () => mine === turn;
    const before = place;
    const next = parse(location.hash);
    main.setAttribute("aria-busy", "true");
    let title;
    try {
      if (!next) throw new Error("There is no such page.");
      title = await { grid: showGrid, neuron: showNeuron, image: showImage }[next.view](next, isCurrent);
      if (title === false) return;
    } catch (error) {
      if (!isCurrent()) return;
      title = "Not found";
      byId("status").textContent = "";
      main.replaceChildren(element("h1", { tabindex: "-1" }, title),
        element("p", { class: "error" }, error.message, " ", link(`#${about.layers[0]}`, "Go to the grid.")));
    }
    place = next;
    if (next?.view === "grid") lastGrid = next;
    if (next) await showControls(gridState(next.layer)).catch(() => null);
    document.title = `${title} · ${siteTitle}`;
    showLayers(next);
    main.setAttribute("aria-busy", "false");
    main.dataset.shown = location.hash;
    return before;
  }

  function showLayers(next) {
    const same = next?.view === "grid" ? next : {};
    for (const anchor of byId("layers").children) {
      const layer = Number(anchor.dataset.layer);
      anchor.setAttribute("href", gridAddress({ ...same, layer }));
      if (layer === next?.layer) anchor.setAttribute("aria-current", next.view === "grid" ? "page" : "true");
      else anchor.removeAttribute("aria-current");
    }
  }

  // A page that was seen before carries a state: there one comes back to where one was.
  async function navigate() {
    if (shownHash !== null) scrolls.set(shownHash, window.scrollY);
    shownHash = location.hash;
    const returns = history.state !== null;
    if (!returns) history.replaceState({ seen: true }, "");
    const before = await show();
    if (before === undefined) return;
    const wanted = returns ? scrolls.get(location.hash) ?? 0 : 0;
    const grows = place?.view !== "neuron";
    while (grows && document.documentElement.scrollHeight < wanted + window.innerHeight && growing?.more());
    window.scrollTo(0, wanted);
    if (before === null || document.activeElement?.closest("header")) return;
    const card = place?.view === "grid" && before.view === "neuron" && main.querySelector(`a[href="#${before.layer}/${before.neuron}"]`);
    (card || main.querySelector("h1")).focus({ preventScroll: true });
  }

  // While one types or chooses, the address changes in place, so that back leads to the page before.
  function change(fields) {
    const now = parse(location.hash);
    const grid = now?.view === "grid" ? now : gridState(now?.layer ?? about.layers[0]);
    const next = { ...grid, ...fields };
    if (!normalize(grid.q) && normalize(next.q) && !CLASS_SORTS.includes(next.sort)) next.sort = ""; // a new search: best match first
    if (now?.view !== "grid") {
      location.hash = gridAddress(next);
      return;
    }
    history.replaceState({ seen: true }, "", gridAddress(next));
    shownHash = location.hash;
    show();
  }

  // ---- controls and keys ----

  let classTitles = [];
  function startControls() {
    const times = new Map();
    for (const name of about.class_names) times.set(name, (times.get(name) ?? 0) + 1);
    classTitles = about.class_names.map((name, i) => (times.get(name) > 1 ? `${name} (class ${i})` : name)); // "crane" is there twice
    const lower = classTitles.map((name) => name.toLowerCase());
    byId("classes").append(...classTitles.map((name) => element("option", { value: name })));
    byId("layers").append(...about.layers.map((layer) => element("a", { "data-layer": layer, href: `#${layer}` }, `Layer ${layer}`)));
    byId("search").addEventListener("input", () => change({ q: byId("search").value }));
    byId("sort").addEventListener("change", () => change({ sort: byId("sort").value }));
    const chooseClass = (whole) => {
      const typed = normalize(byId("class").value);
      let label = lower.indexOf(typed);
      if (label < 0 && whole && typed) label = lower.findIndex((name) => name.includes(typed));
      if (label >= 0) change({ label });
      else if (whole) byId("status").textContent = "No class has this name.";
    };
    byId("class").addEventListener("input", () => chooseClass(false));
    byId("class").addEventListener("change", () => chooseClass(true));
    const { model, pretrained, neurons, splits, texts, text_set: set } = about;
    const images = Object.entries(splits).map(([split, { count, dataset }]) => `${grouped(count)} images of ${dataset} ${split}`).join(", ");
    const most = about.layers.length > 1 ? "up to " : "";
    const each = about.units ? `${most}${grouped(neurons)} ${about.units.kind}` : `${grouped(neurons)} neurons a layer`;
    byId("about").textContent = `${model} (${pretrained}), ${each}; ${images}; `
      + `${grouped(texts.length)} texts (${set}), ${about.components} of them for a ${one}.`;
  }

  // Where an arrow key leads from a card; a row of the grid is the cards of the same height on the page.
  function moveFocus(key, current) {
    const { list, more } = growing;
    const cards = list.children;
    const at = Array.prototype.indexOf.call(cards, current);
    let columns = 1;
    while (columns < cards.length && cards[columns].offsetTop === cards[0].offsetTop) columns++;
    const to = at + { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[key];
    if (to >= cards.length) more();
    cards[to]?.querySelector("a").focus();
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const { key, target } = event;
    const writing = target.closest("input, select, textarea");
    const current = target.closest(".card");
    const isArrow = /^Arrow(Left|Right|Up|Down)$/.test(key);
    if (key === "/" && !writing) {
      byId("search").focus();
      byId("search").select();
    } else if (key === "Escape" && place?.view === "grid") {
      if (writing?.id !== "search") return;
      if (writing.value) change({ q: (writing.value = "") });
      else writing.blur();
    } else if (key === "Escape") {
      if (writing) writing.blur();
      location.hash = gridOf(place?.layer ?? about.layers[0]);
    } else if (key === "ArrowDown" && target === byId("search")) {
      main.querySelector(".card a")?.focus();
    } else if (isArrow && current) {
      moveFocus(key, current);
    } else if ((key === "ArrowLeft" || key === "ArrowRight") && !writing && place?.view !== "grid") {
      main.querySelector(key === "ArrowLeft" ? "a[rel=prev]" : "a[rel=next]")?.click();
    } else {
      return;
    }
    event.preventDefault();
  }

  async function start() {
    try {
      about = await load("about", "data/about.js");
    } catch (error) {
      main.replaceChildren(element("h1", {}, "No data"), element("p", { class: "error" }, error.message));
      return;
    }
    if (about.units) one = Object.keys(about.units.heads).length ? "pair" : "unit";
    many = `${one}s`;
    history.scrollRestoration = "manual";
    document.documentElement.style.setProperty("--columns", about.sheet?.columns ?? 1);
    startControls();
    window.addEventListener("hashchange", navigate);
    document.addEventListener("keydown", onKey);
    navigate();
  }
  start();
})();
