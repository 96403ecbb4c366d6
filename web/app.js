/** The page: takes a file, has the worker encode and decode it, and shows what comes back. */

import { chooseCut, psnr, readLatent, Refused, toPlanes, writeLatent } from "./core.js";

const MOST_PIXELS = 32e6;
const MOST_LATENT_BYTES = 50e6;
const LEAST_SHOWN = 0.1; // milliseconds; what a browser measures is no finer

const find = (id) => document.getElementById(id);
const [pair, slider, original, reconstruction] = ["pair", "slider", "original", "reconstruction"].map(find);

let worker;
let facts; // of export.json; nothing of the model is known here
let job = 0;
let shown; // what the result on the page is of
let last; // what was chosen last, to take it again at another size

// ---- what was chosen

/** Read what a visitor chose as `{name, planes}` or `{name, latent, shape}`, with the size of the image. */
async function read(file, name) {
  if (name.toLowerCase().endsWith(".safetensors")) {
    if (file.size > MOST_LATENT_BYTES) throw new Refused(`is too large for the limit of ${MOST_LATENT_BYTES / 1e6} MB`);
    const limits = {
      channels: facts.latent_channels,
      patch: facts.patch_size,
      leastCells: facts.decoders.at(-1).input.least_rows_and_columns,
      mostCells: longestSide() / facts.patch_size,
    };
    return { ...readLatent(await file.arrayBuffer(), limits), file: name };
  }
  const image = await open(file);
  try {
    const { naturalWidth: width, naturalHeight: height } = image;
    if (width * height > MOST_PIXELS) {
      throw new Refused(`is too large for the limit of ${MOST_PIXELS / 1e6} megapixels, got ${width} x ${height}`);
    }
    const least = facts.encoder.input.least_rows_and_columns;
    const cut = chooseCut(width, height, Number(find("longest").value), facts.patch_size, least);
    return { name, file: name, of: `${width} x ${height} pixels`, ...draw(image, cut) };
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

/** Open a file as an image, which is not decoded before it is drawn. */
async function open(file) {
  const image = new Image();
  const opened = new Promise((resolve, reject) => {
    image.onload = resolve;
    image.onerror = () => reject(new Refused("is no image, or one that this browser cannot read"));
  });
  image.src = URL.createObjectURL(file);
  await opened;
  if (!image.naturalWidth) throw new Refused("is an image without a size");
  return image;
}

/** Draw a cut of an image, on white where it is transparent. */
function draw(image, { left, top, right, bottom, width, height }) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(image, left, top, right - left, bottom - top, 0, 0, width, height);
  const levels = context.getImageData(0, 0, width, height).data;
  return { levels, planes: toPlanes(levels), width, height };
}

function longestSide() {
  return Math.max(...[...find("longest").options].map((option) => Number(option.value)));
}

/** Have a file reconstructed; what was asked for before is given up. */
async function take(file, name) {
  const own = ++job;
  last = { file, name };
  find("message").hidden = true;
  find("result").setAttribute("aria-busy", "true");
  try {
    await ready;
    const chosen = await read(file, name);
    if (own !== job) return;
    begin(chosen);
    const { planes, latent, shape, width, height } = chosen;
    worker.postMessage({ job, planes, latent, shape, width, height });
  } catch (error) {
    if (own === job) refuse(name, error);
  }
}

function refuse(name, error) {
  const message = find("message");
  const isItsFault = error instanceof Refused;
  const what = isItsFault ? "This file cannot be used." : "This browser cannot compute it.";
  message.textContent = `${what} '${name}': ${error.message}.`;
  message.hidden = false;
  find("result").hidden = true; // nothing stands there that could be taken for its result
  if (!isItsFault) console.error(error);
}

// ---- what is shown

function begin(chosen) {
  shown = { ...chosen, started: performance.now(), times: [] };
  find("result").hidden = false;
  find("scales").replaceChildren();
  find("figures").tBodies[0].replaceChildren();
  find("download").hidden = true;
  find("status").textContent = chosen.planes ? "encoding ..." : "decoding ...";
  find("caption").textContent = chosen.planes
    ? "Original on the left, reconstruction on the right"
    : "Decoded from the latent";
  pair.classList.toggle("alone", !chosen.planes);
  pair.style.setProperty("--aspect", chosen.width / chosen.height);
  for (const canvas of [original, reconstruction]) {
    Object.assign(canvas, { width: chosen.width, height: chosen.height }); // which empties it
    if (chosen.planes) put(canvas, chosen.levels, chosen.width, chosen.height);
  }
}

function put(canvas, levels, width, height) {
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(new ImageData(levels, width, height), 0, 0);
}

function showLatent({ latent, shape, milliseconds }) {
  Object.assign(shown, { latent, shape, encoding: milliseconds });
  const file = writeLatent(shown.name, latent, shape, shown.width, shown.height, facts.model);
  const link = find("download");
  URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(new Blob([file]));
  link.download = `${shown.name.replace(/\.[^.]*$/, "")}.safetensors`;
  link.textContent = `Download the latent (${(file.length / 1000).toFixed(1)} kB)`;
  link.hidden = false;
}

function showScale({ scale, levels, width, height, milliseconds, isLast, device, threads }) {
  shown.times.push(performance.now() - shown.started);
  put(reconstruction, levels, width, height);
  reconstruction.classList.toggle("coarse", !isLast);
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Scale ${scale}`);
  canvas.className = isLast ? "" : "coarse";
  put(canvas, levels, width, height);
  const caption = document.createElement("figcaption");
  for (const text of [`scale ${scale}`, `${width} x ${height}`, time(milliseconds)]) {
    caption.append(Object.assign(document.createElement("span"), { textContent: text }));
  }
  const figure = document.createElement("figure");
  figure.append(canvas, caption);
  find("scales").append(figure);
  find("status").textContent = `scale ${scale} of ${facts.scale_factors.length}`;
  if (isLast) showFigures(levels, device, threads);
}

function showFigures(levels, device, threads) {
  const { file, of, planes, shape, width, height, encoding, times, count } = shown;
  const numbers = shape.reduce((a, b) => a * b);
  const rows = [
    [file, of ?? (count > 1 ? `'${shown.name}', the first of ${count} latents` : `'${shown.name}'`)],
    planes && ["PSNR", `${psnr(shown.levels, levels).toFixed(2)} dB`],
    [planes ? "encoded" : "decoded", `${width} x ${height} pixels, ${grouped(3 * width * height)} numbers`],
    ["latent", `${shape.join(" x ")}, ${grouped(numbers)} numbers`],
    ["compression", `${((3 * width * height) / numbers).toFixed(1)}x fewer numbers`],
    planes && ["encoder", time(encoding)],
    ["first scale", `after ${time(times[0])}`],
    ["all scales", `after ${time(times.at(-1))}`],
    ["computed by", device === "webgpu" ? "WebGPU" : `WASM, ${threads} thread${threads > 1 ? "s" : ""}`],
  ];
  const made = rows.filter(Boolean).map(([name, value]) => {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    row.append(head);
    row.insertCell().textContent = value;
    return row;
  });
  find("figures").tBodies[0].replaceChildren(...made);
  find("status").textContent = `${times.length} scales, ${facts.dtype}`;
  find("result").setAttribute("aria-busy", "false");
}

function time(milliseconds) {
  if (milliseconds >= 1000) return `${(milliseconds / 1000).toFixed(2)} s`;
  return milliseconds < 10 ? `${Math.max(milliseconds, LEAST_SHOWN).toFixed(1)} ms` : `${milliseconds.toFixed(0)} ms`;
}

function grouped(number) {
  return number.toLocaleString("en");
}

// ---- controls

function slide(percent) {
  slider.value = percent;
  pair.style.setProperty("--at", `${slider.value}%`);
}

slider.addEventListener("input", () => slide(slider.value));

// A touch on a range moves it in some browsers only, so that pointers are followed here.
function follow(event) {
  if (event.type === "pointermove" && !event.buttons) return;
  const { left, width } = pair.getBoundingClientRect();
  slide(Math.round((100 * (event.clientX - left)) / width));
}

pair.addEventListener("pointerdown", (event) => {
  pair.setPointerCapture(event.pointerId);
  follow(event);
});
pair.addEventListener("pointermove", follow);

find("file").addEventListener("change", ({ target }) => {
  if (target.files[0]) take(target.files[0], target.files[0].name);
  target.value = ""; // the same file can be chosen again
});

for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    find("drop").classList.toggle("over", kind === "dragover");
    const file = event.dataTransfer?.files[0];
    if (kind === "drop" && file) take(file, file.name);
  });
}

async function takeExample(path) {
  const name = path.split("/").at(-1);
  try {
    const answer = await fetch(path);
    await take(await answer.blob(), name);
  } catch (error) {
    refuse(name, error);
  }
}

for (const button of document.querySelectorAll("#examples button")) {
  button.addEventListener("click", () => takeExample(button.dataset.image));
}

find("longest").addEventListener("change", () => last && take(last.file, last.name));

// ---- start

/** Keep the files for visits without a network, from the first on if the page waits for it. */
async function keepFiles() {
  try {
    const registration = await navigator.serviceWorker.register("sw.js");
    if (navigator.serviceWorker.controller || registration.active) return;
    await new Promise((resolve) => {
      navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true });
      setTimeout(resolve, 5000);
    });
  } catch {
    // A browser may keep nothing, as in a private window.
  }
}

/** Start a worker on `wasm`, `webgpu` or, if it is null, on what is there; gives the facts once it has them. */
function launch(device) {
  return new Promise((resolve, reject) => {
    worker = new Worker(device ? `worker.js?device=${device}` : "worker.js", { type: "module" });
    const fail = (reason, failed) => {
      if (failed !== "wasm" && device !== "wasm") {
        worker.terminate(); // what the driver of a GPU cannot do, WASM can
        ready = launch("wasm");
        ready.then(resolve, reject);
        if (shown && last) take(last.file, last.name);
      } else if (facts && shown) {
        refuse(shown.file, new Error(reason));
      } else {
        reject(new Error(reason));
      }
    };
    worker.addEventListener("error", (event) => fail(event.message ?? "the worker cannot be started"));
    worker.addEventListener("message", ({ data }) => {
      if (data.kind === "facts") resolve((facts = data.facts));
      else if (data.kind === "failed") fail(data.reason, data.device);
      else if (data.job !== job) return;
      else if (data.kind === "latent") showLatent(data);
      else if (data.kind === "scale") showScale(data);
    });
  });
}

// `?device=wasm` or `webgpu` compares them.
let ready = keepFiles().then(() => launch(new URLSearchParams(location.search).get("device")));
takeExample(document.querySelector("#examples button").dataset.image);
