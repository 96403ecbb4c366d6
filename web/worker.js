/** Runs the programs of `hieratok export` away from the page, which stays responsive. */

import { toLevels } from "./core.js";

const MOST_THREADS = 4; // other cores are left to the visitor
const MODEL = new URL("model/", import.meta.url);

let ort;
let device = "wasm";
let facts;
let sessions;
let newest = 0;

async function findDevice(wanted) {
  if (wanted === "wasm" || !navigator.gpu) return "wasm";
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  // What computes a GPU on the CPU is slower than WASM.
  return adapter && (wanted === "webgpu" || !adapter.info?.isFallbackAdapter) ? "webgpu" : "wasm";
}

let turn = Promise.resolve();

/** Do one thing after the other: the runtime does not take two at once on a GPU. */
function alone(task) {
  const done = turn.then(task);
  turn = done.catch(() => {});
  return done;
}

/** Open all programs, in the order in which they are needed; each is there when its promise is. */
function openPrograms() {
  const options = { executionProviders: device === "webgpu" ? ["webgpu", "wasm"] : ["wasm"], logSeverityLevel: 3 };
  const opened = new Map();
  let before = Promise.resolve();
  for (const program of [facts.encoder, ...facts.decoders]) {
    const session = before.then(async () => {
      const answer = await fetch(new URL(program.files[0], MODEL));
      if (!answer.ok) throw new Error(`${program.files[0]} cannot be loaded (${answer.status})`);
      const bytes = new Uint8Array(await answer.arrayBuffer());
      return alone(() => ort.InferenceSession.create(bytes, options));
    });
    session.catch(() => {}); // it is told of where the program is needed
    opened.set(program, session);
    before = session;
  }
  return opened;
}

async function start(wanted) {
  const answer = await fetch(new URL("export.json", MODEL));
  if (!answer.ok) throw new Error(`export.json cannot be loaded (${answer.status})`);
  const report = await answer.json();
  const programs = report.programs.filter((program) => program.format === "onnx");
  facts = {
    ...report,
    encoder: programs.find((program) => program.part === "encoder"),
    decoders: programs.filter((program) => program.part === "decoder").sort((a, b) => a.num_scales - b.num_scales),
  };
  device = await findDevice(wanted);
  ort = await import(device === "webgpu" ? "./ort/ort.webgpu.min.mjs" : "./ort/ort.wasm.min.mjs");
  ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MOST_THREADS) : 1;
  sessions = openPrograms();
  tell({ kind: "facts", facts });
}

function tell(message, moved = []) {
  self.postMessage({ ...message, device, threads: ort?.env.wasm.numThreads ?? 1 }, moved);
}

/** Run a program on one input `(1, ...)`, and give its output and how long it took. */
async function run(program, values, shape) {
  const session = await sessions.get(program);
  return alone(async () => {
    const started = performance.now();
    const outputs = await session.run({ [program.input.name]: new ort.Tensor("float32", values, [1, ...shape]) });
    const output = outputs[program.output.name];
    return { values: await output.getData(), shape: output.dims.slice(1), milliseconds: performance.now() - started };
  });
}

/** Let messages in that wait: a program that runs lets none. */
const breathe = () => new Promise((resolve) => setTimeout(resolve));

async function reconstruct({ job, planes, latent, shape, width, height }) {
  if (planes) {
    const moments = await run(facts.encoder, planes, [facts.in_channels, height, width]);
    shape = [moments.shape[0] / 2, ...moments.shape.slice(1)];
    latent = moments.values.slice(0, moments.values.length / 2); // the mean is the mode
    tell({ kind: "latent", job, latent, shape, milliseconds: moments.milliseconds });
  }
  const [, rows, columns] = shape;
  const able = facts.decoders.filter((program) => Math.min(rows, columns) >= program.input.least_rows_and_columns);
  for (const program of able) {
    await breathe();
    if (job !== newest) return;
    const image = await run(program, latent, shape);
    const factor = facts.scale_factors[program.num_scales - 1];
    const [, planeHeight, planeWidth] = image.shape;
    const size = { width: Math.ceil(width / factor), height: Math.ceil(height / factor) };
    const levels = toLevels(image.values, planeWidth, planeHeight, size.width, size.height);
    const isLast = program === able.at(-1);
    const scale = { kind: "scale", job, scale: program.num_scales, levels, ...size, isLast };
    tell({ ...scale, milliseconds: image.milliseconds }, [levels.buffer]);
  }
}

async function work(order) {
  try {
    if (order.kind === "start") await start(order.device);
    else await reconstruct(order);
  } catch (error) {
    tell({ kind: "failed", job: order.job, reason: error.message });
  }
}

let before = work({ kind: "start", device: new URL(self.location).searchParams.get("device") });
self.addEventListener("message", ({ data: order }) => {
  newest = order.job;
  before = before.then(() => (order.job === newest ? work(order) : null));
});
