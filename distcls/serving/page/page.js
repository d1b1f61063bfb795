// The page of `distcls serve`: images in, predictions out. Names of files and classes are anybody's
// text, so they only ever become text nodes, never markup.

const GROUP = { images: 4, bytes: 4 << 20 }; // of a request: small, so that answers come one by one
const AT_ONCE = 3; // requests
const OVERHEAD = 1024; // bytes of multipart/form-data around a file, at most about
const RETRIES = 1; // where the connection broke and the server is there, or another model is
const TOP = 5;
const FOLDED = 12; // classes that are shown before the rest is folded away
const PREVIEW = matchMedia("(max-width: 34rem)").matches ? 80 : 112; // CSS pixels, those of .thumb

const $ = (id) => document.getElementById(id);
let card = null;
let token = null; // in memory only
let guarded = false; // whether the server has wanted one
let items = []; // {file, url, at, state: waiting|sent|done|failed, by, alone, tries}
let hold = null; // why nothing is sent now, with the timer that ends it
let running = 0;
let atOnce = AT_ONCE;
let current = new AbortController(); // ends when the model or the images are given up

/** An element with properties and children; strings become text. */
function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** Somebody's text, kept apart from the direction of what is around it. */
const foreign = (text) => make("bdi", {}, text === "" ? "␣" : text);
const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
const percent = (p) => {
  if (p > 0 && p < 0.0005) return "< 0.1\u202f%";
  if (p < 1 && p >= 0.9995) return "> 99.9\u202f%";
  return `${(100 * p).toFixed(1)}\u202f%`;
};
const duration = (seconds) => {
  const ms = 1000 * seconds;
  if (ms >= 10000) return `${seconds.toFixed(0)}\u202fs`;
  if (ms >= 1000) return `${seconds.toFixed(2)}\u202fs`;
  return `${ms < 0.05 ? "< 0.1" : ms.toFixed(ms < 10 ? 1 : 0)}\u202fms`;
};
const size = (bytes) => {
  if (bytes < 1 << 20) return `${Math.ceil(bytes / 1024)}\u202fkB`;
  return `${+(bytes / (1 << 20)).toFixed(1)}\u202fMB`;
};
const number = (value) => {
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  return Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6 ? value.toExponential(1) : String(+value.toFixed(4));
};

// -- the server -----------------------------------------------------------------------------

class Gone extends Error {}

class Refused extends Error {
  constructor(status, message, wait) {
    super(message);
    Object.assign(this, { status, wait });
  }
}

/** The JSON of a reply; Refused for any status but 200, Gone where there is no server. */
async function request(path, options = {}) {
  const headers = token === null ? {} : { Authorization: `Bearer ${token}` };
  let response, text;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
    text = await response.text();
  } catch {
    throw new Gone();
  }
  let body = null;
  try { body = JSON.parse(text); } catch { /* a proxy's page: its status says enough */ }
  if (response.ok && body !== null) return body;
  const message = typeof body?.error === "string" ? body.error : `the server answered ${response.status}`;
  throw new Refused(response.status, message, Number(response.headers.get("Retry-After")) || 1);
}

function address(path, options) {
  const query = new URLSearchParams(options).toString();
  return query ? `${path}?${query}` : path;
}

/** The model in the addresses: named only where there is a choice. */
const chosen = () => (card && card.models.length > 1 ? { model: card.model } : {});

const identity = ({ model, version }) => JSON.stringify([model, version]);

async function loadCard(model) {
  const wanted = current;
  try {
    const found = await request(address("card", model === undefined ? {} : { model }), { signal: wanted.signal });
    if (wanted !== current) return;
    card = found;
    if (hold?.why !== "busy") release();
    showCard();
    for (const item of items) { // all that is shown is of the model in the heading
      if (item.state === "done" && item.by !== identity(card)) set(item, "waiting", "Waiting");
      if (item.state === "waiting") check(item); // the limits are known now
    }
    pump();
  } catch (error) {
    if (wanted !== current) return;
    if (error.status === 404 && model !== undefined) return loadCard(); // it is served no more
    stop(error, () => loadCard(model));
  }
}

/** Wait as the error demands, then go on. */
function stop(error, goOn) {
  if (error.status === 401) {
    pause({ why: "token" });
    askToken(goOn);
  } else if (error.status === 503) {
    atOnce = 1;
    pause({ why: "busy", seconds: error.wait, goOn });
  } else if (error instanceof Gone) {
    pause({ why: "gone", seconds: 3, goOn });
  } else {
    notice(`The model card cannot be loaded: ${error.message}`, "bad", "Try again", goOn);
  }
}

function pause({ why, seconds, goOn }) {
  if (hold && hold.why === why) return;
  const known = !$("notice").hidden && $("notice").classList.contains(why);
  release();
  hold = { why, timer: null };
  if (why === "token") return showProgress();
  let left = Math.ceil(seconds);
  const tick = () => {
    const again = left > 0 ? `trying again in ${left} s.` : "trying again…";
    const text = why === "busy" ? `Waiting, the server is busy; ${again}` : `The server does not answer; ${again}`;
    notice(text, why, "Try now", resume, known || left < Math.ceil(seconds));
    if (left-- <= 0) resume();
  };
  const resume = () => {
    clearInterval(hold?.timer);
    hold = null;
    goOn();
  };
  hold.timer = setInterval(tick, 1000);
  tick();
  showProgress();
}

function release() {
  clearInterval(hold?.timer);
  hold = null;
  $("notice").hidden = true;
}

/** A line above the images: of a `kind` busy, gone, bad or hint. */
function notice(text, kind, button, action, quietly = false) {
  $("notice").hidden = false;
  $("notice").className = `notice ${kind}`;
  $("notice-text").ariaLive = quietly ? "off" : "polite"; // a countdown is not read out
  $("notice-text").textContent = text;
  $("notice-button").hidden = !button;
  $("notice-button").textContent = button ?? "";
  $("notice-button").onclick = action;
}

function askToken(goOn) {
  if ($("ask").open) return;
  guarded = true;
  if (token !== null) $("ask-why").textContent = "The server did not take that token. Is it complete?";
  token = null;
  $("token").value = "";
  $("ask-form").onsubmit = (event) => {
    event.preventDefault();
    token = $("token").value.trim();
    $("token").value = "";
    $("ask").close();
  };
  $("ask").onclose = () => {
    release();
    showCurl();
    if (token !== null) goOn();
    else {
      hold = { why: "token" };
      notice("This server wants a token; nothing is sent without it.", "hint", "Enter the token", () => askToken(goOn));
    }
  };
  $("ask").showModal();
}

// -- images in ------------------------------------------------------------------------------

/** Files and, of folders, all files below; the entries are taken before the event is over. */
async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return [...transfer.files];
  const found = [];
  const walk = async (entry) => {
    if (entry.isFile) {
      const file = await new Promise((done) => entry.file(done, () => done(null)));
      // a folder holds other things, too; a file that was meant says so on its card
      if (file?.type.startsWith("image/")) found.push(file);
    } else {
      const reader = entry.createReader();
      const inside = [];
      for (let some; !some || some.length; inside.push(...some)) {
        some = await new Promise((done) => reader.readEntries(done, () => done([])));
      }
      inside.sort((one, other) => one.name.localeCompare(other.name, "en", { numeric: true }));
      for (const child of inside) await walk(child);
    }
  };
  for (const entry of entries) await walk(entry);
  return found;
}

function add(files) {
  if (!files.length) return notice("There is no image file in that. Save the picture, then drop or paste the file.", "hint");
  if (!hold) $("notice").hidden = true;
  const before = $("results").firstChild;
  for (const file of files) {
    const item = { file, state: "waiting", alone: false, tries: 0, by: null, at: null };
    item.at = $("result").content.firstElementChild.cloneNode(true);
    const name = item.at.querySelector(".file bdi");
    name.textContent = name.title = file.name;
    const picture = item.at.querySelector(".thumb img");
    picture.onerror = () => {
      picture.hidden = true;
      picture.nextElementSibling.hidden = false;
    };
    item.url = picture.src = URL.createObjectURL(file);
    item.at.querySelector(".again").onclick = () => {
      Object.assign(item, { tries: 0, alone: false });
      set(item, "waiting", "Waiting");
      pump();
    };
    $("results").insertBefore(item.at, before);
    items.push(item);
    set(item, "waiting", "Waiting");
    check(item);
  }
  $("drop").classList.add("some");
  showProgress();
  pump();
}

/** What need not be sent to be refused. */
function check(item) {
  const { type, size: bytes } = item.file;
  const most = card?.limits?.body_bytes ?? Infinity;
  if (type && !type.startsWith("image/") && type !== "application/octet-stream") fail(item, `not an image (${type})`);
  else if (bytes === 0) fail(item, "the file is empty");
  else if (bytes + OVERHEAD > most) fail(item, `too large: ${size(bytes)}, the server takes ${size(most)}; it was not sent`);
}

function clear() {
  current.abort();
  current = new AbortController();
  for (const item of items) URL.revokeObjectURL(item.url);
  items = [];
  $("results").replaceChildren();
  $("drop").classList.remove("some");
  if (hold?.why === "busy") release();
  showProgress();
  if (card === null) loadCard();
  $("drop").focus();
}

// -- images out -----------------------------------------------------------------------------

/** The next images that go together. */
function take() {
  const group = [];
  let bytes = 0;
  const most = Math.min(GROUP.images, card.limits?.images ?? 1);
  const room = Math.min(GROUP.bytes, card.limits?.body_bytes ?? Infinity);
  for (const item of items) {
    if (item.state !== "waiting") continue;
    bytes += item.file.size + OVERHEAD;
    if (group.length && (group.length >= most || bytes > room || item.alone)) break;
    group.push(item);
    if (item.alone) break;
  }
  return group;
}

function pump() {
  while (card !== null && hold === null && running < atOnce) {
    const group = take();
    if (!group.length) break;
    send(group);
  }
  showProgress();
}

async function send(group) {
  const wanted = current;
  running += 1;
  for (const item of group) set(item, "sent", "Predicting");
  try {
    const readable = await Promise.all(group.map(isReadable));
    group.filter((_, at) => !readable[at]).forEach((item) => fail(item, "the file cannot be read; was it moved or changed?"));
    group = group.filter((_, at) => readable[at]);
    if (!group.length) return;
    const body = new FormData();
    for (const { file } of group) body.append("image", file, file.name);
    const began = performance.now();
    const reply = await request(address("predict", query()), { method: "POST", body, signal: wanted.signal });
    const seconds = (performance.now() - began) / 1000;
    if (wanted !== current) return;
    if (reply.predictions?.length !== group.length) throw new Refused(502, "the answer is not for these images");
    if (identity(reply) !== identity(card) && group.every((item) => item.tries++ < RETRIES)) {
      // a new version is served, or another model since a restart: its card first
      group.forEach((item) => set(item, "waiting", "Waiting"));
      await loadCard(chosen().model);
      return;
    }
    for (const item of group) item.by = identity(reply);
    group.forEach((item, at) => answer(item, reply.predictions[at], seconds, group.length));
    atOnce = AT_ONCE;
    if (hold === null && $("notice").matches(".busy, .gone")) release();
  } catch (error) {
    if (wanted === current) await unanswered(group, error);
  } finally {
    running -= 1;
    pump();
  }
}

const isReadable = (item) => item.file.slice(0, 1).arrayBuffer().then(() => true, () => false);

function query() {
  const options = { ...chosen(), input: true };
  if (card.task === "single_label") options.top_k = Math.min(TOP, card.classes.length);
  if (card.task === "multi_label") options.probabilities = true;
  return options;
}

/** A request without predictions: later, one image at a time, or never. */
async function unanswered(group, error) {
  const wanted = current;
  const wait = () => group.forEach((item) => set(item, "waiting", "Waiting"));
  const known = error instanceof Refused;
  if (known && (error.status === 401 || error.status === 503)) {
    wait();
    stop(error, pump);
  } else if (known && group.length > 1 && error.status < 500) {
    for (const item of group) item.alone = true; // one of them is to blame, not its neighbours
    wait();
  } else if (known) {
    group.forEach((item) => fail(item, error.message, error.status >= 500));
  } else if (!(error instanceof Gone)) {
    console.error(error);
    group.forEach((item) => fail(item, `the answer cannot be shown: ${error.message}`, true));
  } else {
    const there = await request(address("card", chosen())).then(() => true, (other) => other instanceof Refused);
    if (wanted !== current) return;
    group.forEach((item) => { item.tries += there ? 1 : 0; });
    const lost = group.filter((item) => item.tries > RETRIES);
    lost.forEach((item) => fail(item, "the server closed the connection", true));
    group = group.filter((item) => !lost.includes(item));
    wait();
    if (!there) stop(error, () => loadCard(chosen().model));
  }
}

// -- a prediction ---------------------------------------------------------------------------

function set(item, state, text) {
  item.state = state;
  item.at.classList.remove("waiting", "sent", "done", "failed");
  item.at.classList.add(state);
  item.at.querySelector(".label").replaceChildren(text);
  item.at.querySelector(".bars").replaceChildren();
  item.at.querySelector(".again").hidden = true;
  item.at.querySelector(".input").hidden = item.at.querySelector(".time").hidden = true;
}

function fail(item, message, again = false) {
  set(item, "failed", foreign(message));
  item.at.querySelector(".again").hidden = !again;
  showProgress();
}

function answer(item, prediction, seconds, together) {
  if (prediction.error !== null) return fail(item, prediction.error);
  set(item, "done", "");
  const label = item.at.querySelector(".label");
  const sure = make("span", { className: "sure" }, percent(prediction.probability));
  if (card.task === "multi_label") {
    const tags = prediction.labels.map((name) => make("span", { className: "tag" }, foreign(name)));
    label.replaceChildren(...(tags.length ? tags : [make("span", { className: "none" }, "No label found")]));
  } else {
    if (card.task === "multi_head") sure.textContent += " for all heads";
    label.replaceChildren(foreign(prediction.label), sure);
  }
  const bars = item.at.querySelector(".bars");
  bars.classList.toggle("heads", card.task === "multi_head");
  bars.append(...lines(prediction).map(bar));
  showInput(item, prediction.input);
  showTime(item, prediction.seconds, seconds, together);
}

/** The rows of bars: {head, name, p, strong}. */
function lines(prediction) {
  if (card.task === "multi_head") {
    return card.heads.map((head) => {
      const { label, probability } = prediction.heads[head.name];
      return { head: head.name, name: label, p: probability, strong: true };
    });
  }
  if (card.task === "multi_label") {
    const found = new Set(prediction.labels);
    const likeliest = Object.entries(prediction.probabilities).sort((one, other) => other[1] - one[1]);
    const most = Math.max(TOP, found.size);
    return likeliest.slice(0, most).map(([name, p]) => ({ name, p, strong: found.has(name) }));
  }
  return prediction.top_k.map(({ label, probability }, at) => ({ name: label, p: probability, strong: at === 0 }));
}

function bar({ head, name, p, strong }) {
  const fill = make("i");
  fill.style.width = `${100 * p}%`;
  const row = make("li", { className: strong ? "in" : "" });
  if (head !== undefined) row.append(make("span", { className: "name soft", title: head }, foreign(head)));
  const track = make("span", { className: "track" }, fill);
  track.ariaHidden = "true";
  row.append(
    make("span", { className: "name", title: name }, foreign(name)),
    track,
    make("span", { className: "number" }, percent(p)),
  );
  return row;
}

function showInput(item, source) {
  if (typeof source !== "string" || !source.startsWith("data:image/")) return;
  const [height, width] = card.preprocess.size;
  const button = item.at.querySelector(".input");
  const picture = button.querySelector("img");
  picture.src = source;
  const factor = PREVIEW / Math.max(height, width);
  fit(picture, width, height, factor >= 1 ? Math.floor(factor) : factor);
  button.lastElementChild.textContent = `input ${width} × ${height}${card.limits?.explain ? ", and why" : ""}`;
  button.setAttribute("aria-label", `What the network sees of ${item.file.name}, enlarged`);
  button.onclick = () => showSeen(item, source);
  button.hidden = false;
}

function fit(picture, width, height, factor) {
  picture.style.width = `${Math.max(1, width * factor)}px`;
  picture.style.aspectRatio = `${width} / ${height}`;
  picture.classList.toggle("pixels", factor >= 1);
}

function showSeen(item, source) {
  const [height, width] = card.preprocess.size;
  const { clientWidth, clientHeight } = document.documentElement;
  const room = Math.min(512, clientWidth - 88, clientHeight - 220);
  const factor = Math.max(1, Math.floor(room / Math.max(width, height)));
  $("seen-file").src = item.url;
  $("seen-name").textContent = item.file.name;
  $("seen-one").src = $("seen-large").src = source;
  fit($("seen-one"), width, height, 1);
  fit($("seen-large"), width, height, factor);
  $("seen-factor").textContent = factor === 1 ? "1:1" : `${factor} times enlarged, pixel by pixel`;
  $("seen-one").parentElement.hidden = factor === 1;
  $("seen-rule").textContent = `${width} × ${height} pixels: ${rule(card.preprocess)}.`;
  $("seen-why").hidden = !card.limits?.explain;
  $("seen-heat").hidden = true;
  $("seen-explain").hidden = false;
  $("seen-told").textContent = "";
  $("seen-explain").onclick = () => explain(item);
  $("seen").showModal();
}

/** Ask for the map, and show it in the dialog, unless that shows another image by then. */
async function explain(item) {
  const told = $("seen-told");
  const shown = item.url;
  $("seen-explain").hidden = true;
  told.textContent = "Covering parts of the image\u2026";
  try {
    const body = new FormData();
    body.append("image", item.file, item.file.name);
    const asked = { ...chosen(), explain: true, top_k: 1 };
    const reply = await request(address("predict", asked), { method: "POST", body, signal: current.signal });
    if ($("seen-file").src !== shown) return;
    const source = reply.predictions?.[0]?.explanation;
    if (typeof source !== "string" || !source.startsWith("data:image/")) throw new Error("no map came");
    $("seen-heat").src = source;
    $("seen-heat").hidden = false;
    told.textContent = "What the prediction rests on is bright.";
  } catch (error) {
    if ($("seen-file").src !== shown) return;
    $("seen-explain").hidden = false;
    told.textContent = error instanceof Gone ? "The server does not answer." : error.message;
  }
}

function showTime(item, spent, seconds, together) {
  const parts = ["decode", "queue", "infer"].map((name) => [name, spent[name] ?? 0]);
  const at = item.at.querySelector(".time");
  at.querySelectorAll("i").forEach((part, index) => {
    part.style.width = `${Math.min(100, (100 * parts[index][1]) / seconds)}%`;
  });
  const shared = together > 1 ? ` for ${together} images` : "";
  at.querySelector("p").replaceChildren(
    ...parts.map(([name, value]) => make("span", {}, `${name} ${duration(value)}`)),
    make("span", {}, `round trip ${duration(seconds)}${shared}`),
  );
  at.hidden = false;
}

function showProgress() {
  const of = (state) => items.filter((item) => item.state === state).length;
  const failed = of("failed");
  const over = of("done") + failed;
  $("progress").hidden = !items.length;
  $("bar").max = Math.max(1, items.length);
  $("bar").value = over;
  $("bar").classList.toggle("full", over === items.length);
  const text = over < items.length ? `${over} of ${count(items.length, "image")}` : count(items.length, "image");
  const status = `${text}${failed ? `, ${failed} without a prediction` : ""}`;
  if ($("status").textContent !== status) $("status").textContent = status;
}

// -- the model card -------------------------------------------------------------------------

const RESIZES = {
  squash: () => "the whole image, its aspect ratio ignored",
  pad: () => "the whole image, on black",
  crop: ({ crop_fraction: part }) => `the centre of the image${part === 1 ? "" : `, ${+(100 * part).toFixed(1)}\u202f% of its sides`}`,
};

function rule(preprocess) {
  const colours = { "255,255,255": "white", "0,0,0": "black" };
  const colour = preprocess.background && (colours[preprocess.background] ?? `rgb(${preprocess.background.join(", ")})`);
  const background = colour ? `; transparent pixels on ${colour}` : "";
  return `${RESIZES[preprocess.resize]?.(preprocess) ?? preprocess.resize}, ${preprocess.interpolation} interpolation${background}`;
}

const kind = () => {
  if (card.task === "multi_head") return `one class for each of ${count(card.heads.length, "head")}`;
  return card.task === "multi_label" ? `any number of ${count(card.classes.length, "label")}` : count(card.classes.length, "class", "classes");
};

function showCard() {
  const [height, width] = card.preprocess.size;
  document.title = `${card.model} · distcls`;
  $("title").textContent = card.model;
  $("summary").textContent = `${kind()} · input ${width} × ${height}`;
  $("models").hidden = card.models.length < 2;
  $("model").replaceChildren(...card.models.map((name) => make("option", { value: name, selected: name === card.model }, name)));
  const most = card.limits?.body_bytes;
  $("allowed").textContent = `Sent to ${location.host} only${most ? `, up to ${size(most)} an image` : ""}.`;
  $("card").replaceChildren(make("h2", {}, "Model card"), ...facts(), ...classes(), ...training(), ...certificate(), ...file());
  $("card").ariaBusy = "false";
  showCurl();
}

function table(rows) {
  return make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, foreign(name)), make("dd", {}, foreign(String(value)))]));
}

function fold(title, ...content) {
  return make("details", {}, make("summary", {}, title), ...content);
}

function facts() {
  const [height, width] = card.preprocess.size;
  return [
    table([["Name", card.model], ["Version", card.version], ["Input", `${width} × ${height}`], ["Runs on", card.provider]]),
    make("p", { className: "words soft" }, `Sees ${rule(card.preprocess)}.`),
    ...(card.calibration ? [make("p", { className: "words soft" }, "Its probabilities are calibrated.")] : []),
  ];
}

function classes() {
  const list = (names) => make("ul", { className: "classes" }, ...names.map((name) => make("li", {}, foreign(name))));
  const shown = (names) => {
    if (names.length <= FOLDED) return [list(names)];
    return [list(names.slice(0, FOLDED)), fold(`${(names.length - FOLDED).toLocaleString("en")} more`, list(names.slice(FOLDED)))];
  };
  if (card.task !== "multi_head") {
    return [make("h3", {}, card.task === "multi_label" ? "Labels" : "Classes"), ...shown(card.classes)];
  }
  const heads = card.heads.map((head) => make("details", { open: card.heads.length <= 3 }, make("summary", {}, foreign(head.name)), ...shown(head.classes)));
  return [make("h3", {}, "Heads"), ...heads];
}

/** Plain JSON as rows: [name, value], the names of nested objects before those within. */
function flat(value, name = "") {
  if (value === null || value === undefined) return [];
  if (typeof value !== "object") return [[name, number(value)]];
  if (Array.isArray(value) && value.every((part) => typeof part !== "object")) return [[name, value.map(number).join(", ")]];
  return Object.entries(value).flatMap(([key, part]) => flat(part, `${name} ${key.replaceAll("_", " ").replace(/^top(?=\d)/, "top-")}`.trim()));
}

const FIRST = ["dataset", "epoch", "validation top-1", "validation exact", "validation macro f1", "validation loss"];

function training() {
  const rows = flat(card.training);
  const first = FIRST.flatMap((name) => rows.filter((row) => row[0] === name));
  const rest = rows.filter((row) => !first.includes(row));
  const found = [make("h3", {}, "Training")];
  if (!rows.length) found.push(make("p", { className: "words soft" }, "The file says nothing of it."));
  if (first.length) found.push(table(first));
  if (rest.length) found.push(first.length ? fold(`${count(rest.length, "more value")}`, table(rest)) : table(rest));
  return found;
}

/** What the export measured, in words. */
function certificate() {
  const found = [make("h3", {}, "Certificate")];
  const held = card.certificate;
  const say = (text) => found.push(make("p", { className: "words" }, text));
  if (!held) {
    say("None: this file was not compared with its checkpoint.");
    return found;
  }
  const images = `${count(held.images, "image")} of ${held.split}`;
  if (Array.isArray(held.results)) {
    const agreement = Math.min(...held.results.map((result) => result.top1_agreement));
    const difference = Math.max(...held.results.map((result) => result.max_logit_difference));
    const batches = held.results.map((result) => result.batch_size).join(", ");
    const same = agreement === 1 ? "the same prediction as its checkpoint for every one" : `the same prediction as its checkpoint for ${percent(agreement)}`;
    say(`Compared on ${images}, this file gave ${same}, in batches of ${batches}. Logits differed by at most ${number(difference)} (${number(held.tolerance)} allowed).`);
  } else {
    say(`In ${held.precision}, this file is right on ${percent(held.top1)} of ${images}, its checkpoint on ${percent(held.top1_reference)}; they agree on ${percent(held.top1_agreement)}.`);
  }
  if (held.distinct_predictions !== undefined) say(`${count(held.distinct_predictions, "different prediction")} among them.`);
  if (held.warnings?.length) found.push(make("ul", { className: "warnings" }, ...held.warnings.map((text) => make("li", {}, foreign(text)))));
  const by = [["Checkpoint ran on", held.reference], ["File ran on", held.provider], ["Machine", held.machine]];
  found.push(fold("Measured on", table(by.filter((row) => row[1] !== undefined))));
  return found;
}

function file() {
  return [make("h3", {}, "SHA-256 of the file"), make("p", { className: "hash" }, card.sha256)];
}

/** The command for a POSIX shell; all that is quoted is percent-encoded. */
function showCurl() {
  const here = new URL(address("predict", { ...chosen(), ...(card?.task === "single_label" ? { top_k: Math.min(TOP, card.classes.length) } : {}) }), location.href);
  const bearer = !guarded ? "" : '  -H "Authorization: Bearer $TOKEN" \\\n';
  $("metrics").hidden = guarded; // a link carries no token
  $("curl").textContent = `curl -F image=@photo.jpg \\\n${bearer}  '${here.href.replaceAll("'", "%27")}'`;
}

async function copy() {
  let done = true;
  try {
    await navigator.clipboard.writeText($("curl").textContent);
  } catch { // only https:// and this machine's own address have a clipboard
    getSelection().selectAllChildren($("curl"));
    done = document.execCommand("copy");
  }
  $("copy").textContent = done ? "Copied" : "Press Ctrl C";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 2000);
}

// -- what the user does ---------------------------------------------------------------------

for (const id of ["choose", "photo"]) {
  $(id).onchange = (event) => {
    const files = [...event.target.files];
    event.target.value = ""; // the same file may be chosen again
    if (files.length) add(files);
  };
}
let depth = 0; // of dragenter: each element on the way has one
const over = (value) => {
  depth = value;
  document.body.classList.toggle("over", depth > 0);
};
document.addEventListener("dragenter", () => over(depth + 1));
document.addEventListener("dragleave", () => over(Math.max(0, depth - 1)));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  over(0);
  add(await filesOf(event.dataTransfer));
});
document.addEventListener("paste", (event) => {
  if ($("ask").open) return;
  add([...event.clipboardData.files]);
});
$("clear").onclick = clear;
$("copy").onclick = copy;
$("seen-close").onclick = () => $("seen").close();
$("seen").onclick = (event) => { if (event.target === $("seen")) $("seen").close(); };
$("model").onchange = (event) => {
  current.abort();
  current = new AbortController();
  release();
  for (const item of items) { // the same images again: what was said, the other model has said
    Object.assign(item, { tries: 0, alone: false });
    set(item, "waiting", "Waiting");
    check(item);
  }
  card = null;
  $("card").ariaBusy = "true";
  loadCard(event.target.value);
};
showCurl();
loadCard();
