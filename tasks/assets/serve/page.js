"use strict";

const $ = (id) => document.getElementById(id);
const TOKEN = "mmssl-token";
const WORDS = { image: "pictures", video: "videos", audio: "sounds", text: "texts" };
const SENSES = { image: "seen", video: "seen", audio: "heard" };
let about = null;
let chosen = null;
let shown = [];

/** Ask the service; returns its answer, and throws an Error with one sentence. */
async function ask(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The service does not answer; is it running?");
  }
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({ detail: answer.statusText }));
  if (answer.status === 401) askForToken(token ? problem.detail : "");
  throw new Error(problem.detail || `The service answers ${answer.status}.`);
}

function askForToken(sentence) {
  $("token-section").hidden = false;
  $("token-message").textContent = sentence;
  $("lead").textContent = "Give the token first.";
  $("token").focus();
}

async function start() {
  try {
    about = await (await ask("/v1/about")).json();
  } catch (error) {
    if ($("token-section").hidden) $("lead").textContent = error.message;
    return;
  }
  $("token-section").hidden = true;
  const { routes, modalities, files } = about;
  const media = modalities.filter((name) => name !== "text");
  const kinds = list((media.length ? media : modalities).map((name) => WORDS[name] ?? name));
  const names = routes["zero-shot"] || routes.classify;
  $("name-section").hidden = !names && !(routes.search && media.length);
  $("name-section").querySelector("h2").textContent = names ? "Name a file" : "Start from a file";
  $("classes-part").hidden = !routes["zero-shot"];
  $("name-button").hidden = !names;
  $("like-button").hidden = !routes.search;
  $("search-section").hidden = !routes.search;
  $("search-form").hidden = !modalities.includes("text");
  $("template").querySelectorAll("[data-of]").forEach((one) => {
    if (!modalities.includes(one.dataset.of)) one.remove();
  });
  $("query-label").textContent = `What is to be ${[...new Set(media.map((name) => SENSES[name]))].join(" or ") || "read"}`;
  $("file").accept = [...files, ...media.map((name) => `${name}/*`)].join(",");
  $("file-note").textContent = `${kinds[0].toUpperCase()}${kinds.slice(1)}, up to ${(about.limits.body / 2 ** 20).toFixed(0)} MB. `
    + "It goes to this service alone and is not kept.";
  const can = [
    names && `names ${kinds}`,
    routes.search && `searches ${about.searched.toLocaleString("en")} files`,
  ].filter(Boolean);
  $("lead").textContent = can.length ? `This service ${can.join(" and ")}.` : `This service gives programs the vectors of ${kinds}.`;
}

const list = (words) => words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;

function choose(file) {
  chosen = file ?? null;
  const preview = $("preview");
  preview.querySelectorAll("[src]").forEach((element) => URL.revokeObjectURL(element.src));
  preview.replaceChildren();
  $("name-message").textContent = "";
  if (!chosen) return;
  const kind = { image: "img", video: "video", audio: "audio" }[chosen.type.split("/")[0]];
  if (!kind) return;
  const element = document.createElement(kind);
  if (kind === "img") element.alt = `the chosen file, ${chosen.name}`;
  else element.controls = true;
  element.addEventListener("error", () => element.remove());
  element.src = URL.createObjectURL(chosen);
  preview.append(element);
}

/** Run one question: buttons wait, the error of the last one goes. */
async function run(message, button, work) {
  $(message).textContent = "";
  button.disabled = true;
  try {
    await work();
  } catch (error) {
    $(message).textContent = error.message;
  } finally {
    button.disabled = false;
  }
}

function form(fields) {
  const data = new FormData();
  for (const [name, value] of Object.entries(fields)) if (value) data.append(name, value);
  return { method: "POST", body: data };
}

function theFile() {
  if (!chosen) throw new Error("Choose a file first.");
  if (chosen.size > about.limits.body - 4096) throw new Error("The file is larger than this service takes.");
  return chosen;
}

async function nameIt() {
  $("name-results").replaceChildren();
  const file = theFile();
  let answer;
  if (about.routes["zero-shot"]) {
    const classes = $("classes").value.trim();
    if (!classes) throw new Error("Type the classes first, such as: cat, dog.");
    answer = await ask("/v1/zero-shot", form({ file, classes, templates: $("template").value, top: "10" }));
  } else {
    answer = await ask("/v1/classify", form({ file, top: "10" }));
  }
  const bars = document.createElement("ol");
  bars.className = "bars";
  for (const { label, score } of await answer.json()) bars.append(bar(label, score));
  $("name-results").replaceChildren(bars);
}

function bar(label, score) {
  const row = document.createElement("li");
  row.append(cell("label", label), cell("value", `${(100 * score).toFixed(1)} %`), cell("bar", ""));
  row.lastChild.style.setProperty("--value", `${100 * score}%`);
  row.lastChild.setAttribute("aria-hidden", "true");
  return row;
}

function cell(kind, words) {
  const element = document.createElement("span");
  element.className = kind;
  element.textContent = words;
  return element;
}

function forgetHits() {
  shown.forEach((url) => URL.revokeObjectURL(url));
  shown = [];
  $("search-results").replaceChildren();
  $("search-count").textContent = "";
}

async function find(fields) {
  forgetHits();
  const hits = await (await ask("/v1/search", form({ ...fields, top: "24" }))).json();
  const files = hits.length === 1 ? "1 file" : `${hits.length} files`;
  $("search-count").textContent = `${files}${fields.file ? ` like ${fields.file.name}` : ""}, the nearest first`;
  $("search-results").replaceChildren(...hits.map(hit));
}

function hit({ id, name, score }) {
  const item = document.createElement("li");
  const figure = document.createElement("figure");
  const image = document.createElement("img");
  const caption = document.createElement("figcaption");
  image.alt = "";
  caption.append(cell("value", score.toFixed(3)), name);
  figure.append(image, caption);
  item.append(figure);
  // Not as an address of the picture: a token is sent with requests of ours alone.
  ask(`/v1/media/${id}`).then((answer) => answer.blob()).then((blob) => {
    image.src = URL.createObjectURL(blob);
    shown.push(image.src);
  }).catch(() => image.replaceWith(cell("blank", "")));
  return item;
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, $("token").value);
  start();
});
$("file").addEventListener("change", () => choose($("file").files[0]));
$("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  run("name-message", $("name-button"), nameIt);
});
$("like-button").addEventListener("click", () => run("name-message", $("like-button"), async () => {
  $("query").value = "";
  await find({ file: theFile() });
  $("search-section").scrollIntoView();
}));
$("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  run("search-message", $("search-form").querySelector("button"), () => {
    const text = $("query").value.trim();
    forgetHits();
    if (!text) throw new Error("Type what is looked for first.");
    return find({ text });
  });
});
// A file that misses the field must not replace the page.
for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault());
$("drop").addEventListener("dragover", () => $("drop").classList.add("over"));
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  $("drop").classList.remove("over");
  if (event.dataTransfer.files.length) {
    $("file").files = event.dataTransfer.files;
    choose(event.dataTransfer.files[0]);
  }
});
start();
