"use strict";
// SETTINGS comes from settings.js: most, examples, lora, about.

const $ = id => document.getElementById(id);

function make(tag, properties = {}, ...inside) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...inside);
  return element;
}

let classes = [{name: "", images: []}, {name: "", images: []}];
let queries = [];
let turn = 0;   // an answer that comes after the form was changed is dropped
let seed = 0;   // of the next example

function say(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function changed() {
  turn++;
  $("result").hidden = true;
  $("state").textContent = "";
  say("");
}

// ---- files

function readFile(blob, name) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error(name + " cannot be read. Is it a folder?"));
    reader.readAsDataURL(blob);
  });
}

// A photo of many megapixels is made smaller here; null if it is small, or cannot be read here.
// Decoding is done beside the page, one picture at a time, and its memory is given back at once.
async function shrink(file) {
  let bitmap;
  try { bitmap = await createImageBitmap(file); } catch (e) { return null; }
  const scale = Math.min(1, SETTINGS.most.side / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size <= SETTINGS.most.file_bytes) { bitmap.close(); return null; }
  const width = Math.max(1, Math.round(bitmap.width * scale));
  const canvas = new OffscreenCanvas(width, Math.max(1, Math.round(bitmap.height * scale)));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.convertToBlob({type: "image/png"});
}

async function loadImage(file) {
  const smaller = await shrink(file);
  return {name: file.name, data: await readFile(smaller || file, file.name)};
}

// One file after the other: many of them neither block the page nor fill its memory.
async function add(images, files) {
  changed();
  const mine = turn;
  const wrong = [];
  for (const [i, file] of [...files].entries()) {
    if (files.length > 8) $("state").textContent = `reading ${i + 1} of ${files.length} ...`;
    try { images.push(await loadImage(file)); } catch (e) { wrong.push(e.message); }
  }
  if (mine === turn) $("state").textContent = "";
  draw();
  if (wrong.length) say(wrong.slice(0, 3).join(" "));
}

// ---- the form

function thumbnail(images, i, what) {
  const image = images[i];
  const picture = make("img", {src: image.data, alt: image.name, decoding: "async"});
  const title = image.name + " (click to remove)";
  const button = make("button", {className: "thumb", title}, picture);
  button.setAttribute("aria-label", `remove ${image.name} from ${what}`);
  button.dataset.key = `${what} ${i}`;
  button.onclick = () => { changed(); images.splice(i, 1); draw(); };
  return button;
}

function dropZone(images, what, ...above) {
  const file = make("input", {type: "file", multiple: true, accept: "image/*"});
  file.setAttribute("aria-label", "images of " + what);
  file.dataset.key = what;
  const chosen = () => { const files = [...file.files]; file.value = ""; return files; };
  file.onchange = () => add(images, chosen());
  const thumbs = images.map((_, i) => thumbnail(images, i, what));
  const zone = make("div", {className: "drop"}, ...above, ...thumbs, file);
  zone.setAttribute("role", "group");
  zone.setAttribute("aria-label", `${what}, ${images.length} images`);
  zone.ondragover = e => { e.preventDefault(); zone.classList.add("over"); };
  zone.ondragleave = () => zone.classList.remove("over");
  zone.ondrop = e => { e.preventDefault(); add(images, e.dataTransfer.files); };
  return zone;
}

function classZone(c, i) {
  const what = "class " + (i + 1);
  const name = make("input", {type: "text", value: c.name, maxLength: 100});
  name.placeholder = "name of " + what;
  name.setAttribute("aria-label", name.placeholder);
  name.dataset.key = name.placeholder;
  name.oninput = () => { changed(); c.name = name.value; };
  const gone = make("button", {textContent: "×", title: "remove this class"});
  gone.setAttribute("aria-label", "remove " + what);
  gone.onclick = () => { changed(); classes.splice(i, 1); draw(); };
  return dropZone(c.images, what, name, " ", gone, make("br"));
}

function draw() {
  const key = document.activeElement && document.activeElement.dataset.key;
  $("classes").replaceChildren(...classes.map(classZone));
  $("queries").replaceChildren(dropZone(queries, "the queries"));
  $("more").disabled = classes.length >= SETTINGS.most.classes;
  if (!key) return;   // the keyboard stays where it was, or at the box that it was in
  const find = k => document.querySelector(`[data-key="${CSS.escape(k)}"]`);
  const there = find(key) || find(key.replace(/ \d+$/, ""));
  if (there) there.focus();
}

// ---- the server

async function ask(path, options) {
  let reply, found;
  try {
    reply = await fetch(path, options);
    found = await reply.json();
  } catch (e) {
    throw new Error("The page's server does not answer. Was it stopped?");
  }
  if (!reply.ok) throw new Error(found.error);
  return found;
}

async function work(text, job) {
  const mine = ++turn;
  say("");
  $("state").textContent = text;
  try {
    const found = await job();
    if (mine !== turn) return undefined;
    $("state").textContent = "";
    return found;
  } catch (e) {
    if (mine === turn) { changed(); say(e.message); }
    return undefined;
  }
}

function request(part) {
  const body = JSON.stringify({
    names: classes.map(c => c.name),
    supports: classes.map(c => c.images),
    queries: part,
    share: +$("share").value,
    lora: $("lora").checked,
    reject: $("reject").checked,
  });
  const most = SETTINGS.most.request_bytes;
  if (body.length > most)
    throw new Error(`The images take more than ${most >> 20} MB together. ` +
      "Use fewer or smaller ones.");
  return ask("classify", {
    method: "POST", headers: {"Content-Type": "application/json"}, body,
  });
}

// As many queries at once as the server takes, then the next ones.
async function askAll() {
  const step = SETTINGS.most.queries;
  const whole = await request(queries.slice(0, step));
  for (let i = step; i < queries.length; i += step) {
    $("state").textContent = `working, ${i} of ${queries.length} ...`;
    const next = await request(queries.slice(i, i + step));
    whole.predictions.push(...next.predictions);
  }
  return whole;
}

async function classify() {
  const found = await work("working ...", askAll);
  if (found) show(found);
}

// ---- the answer

function bars(names, prediction) {
  const p = prediction.probabilities;
  const best = names.indexOf(prediction.label);
  const order = names.map((_, i) => i)
    .sort((a, b) => (b === best) - (a === best) || p[b] - p[a]);
  return order.slice(0, 5).map((i, rank) => {
    const bar = make("i");
    bar.style.width = 100 * p[i] + "%";
    const className = rank || prediction.refused ? "bar" : "bar best";
    const percent = (100 * p[i]).toFixed(1) + " %";
    bar.setAttribute("aria-hidden", "true");
    return make("div", {className}, make("span", {textContent: names[i]}), bar, percent);
  });
}

function alike(answer, c, n) {
  const alt = `${answer.names[c]}, labelled image ${n + 1}`;
  return make("figure", {}, make("img", {src: answer.supports[c][n], alt}),
    make("figcaption", {textContent: answer.names[c]}));
}

function showRow(answer, prediction, i) {
  const cell = (...inside) => make("td", {}, ...inside);
  const refused = prediction.refused
    ? [make("div", {className: "refused", textContent: "none of these; if one, then:"})] : [];
  return make("tr", {className: "prediction"},
    cell(make("img", {src: prediction.seen, alt: "query " + (i + 1)}),
      make("small", {textContent: queries[i].name})),
    cell(make("img", {src: prediction.kept, alt: `patches kept of query ${i + 1}`,
      className: "kept"})),
    cell(...prediction.nearest.map(([c, n]) => alike(answer, c, n))),
    cell(...refused, ...bars(answer.names, prediction)));
}

function showClass(answer, name, c) {
  const pictures = answer.supports[c].map((src, i) => {
    const central = i === answer.central[c];
    return make("img", {src, alt: name + (central ? ", nearest to the mean" : ""),
      className: central ? "central" : ""});
  });
  return make("div", {}, make("b", {textContent: name}), make("br"), ...pictures);
}

function show(answer) {
  $("prototypes").replaceChildren(...answer.names.map((name, c) => showClass(answer, name, c)));
  $("legend").textContent =
    `By ${answer.about}. Kept: the ${answer.n_kept} of ${answer.n_patches} patches that the ` +
    "last layer attends to most; the rest is hatched. Probabilities: softmax of minus squared " +
    `distances at temperature ${answer.temperature.toPrecision(3)}, ` +
    (answer.calibrated ? "which the labelled images decide." : "which was asked for.");
  $("rows").replaceChildren(...answer.predictions.map((p, i) => showRow(answer, p, i)));
  $("result").hidden = false;
  const none = answer.predictions.filter(p => p.refused).length;
  $("state").textContent = `${answer.predictions.length} predictions` +
    (none ? `, ${none} of them none of these.` : ".");
  $("predictions").focus({preventScroll: true});
}

// ---- buttons

async function loadExample(name) {
  const found = await work("drawing the example ...", () => ask(`example/${name}/${seed++}`));
  if (!found) return;
  changed();
  classes = found.names.map((name, i) => ({name, images: found.supports[i]}));
  queries = found.queries;
  draw();
}

for (const name of SETTINGS.examples) $(name).onclick = () => loadExample(name);
$("more").onclick = () => { changed(); classes.push({name: "", images: []}); draw(); };
$("go").onclick = classify;
$("share").oninput = () => {
  $("percent").textContent = Math.round(100 * $("share").value) + " %";
};
const again = () => { if (!$("result").hidden) classify(); };
for (const id of ["share", "lora", "reject"]) $(id).onchange = again;
$("with").hidden = !SETTINGS.lora;
$("about").textContent = SETTINGS.about;
// a file dropped beside a box must not replace the page
window.ondragover = window.ondrop = e => e.preventDefault();
draw();
