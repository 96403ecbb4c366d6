/** Pure functions of the page: cuts, levels, PSNR, and files of latents. They know of no page and no program. */

/** A file that cannot be used; its message is for the visitor. */
export class Refused extends Error {}

/**
 * Choose the part of an image that is encoded: shrunk to `longest` pixels a side if it is larger, and from its middle
 * as many whole patches as it has, as `hieratok reconstruct` takes them.
 *
 * Returns the part `{left, top, right, bottom}` in pixels of the image, and the `width` and `height` it is drawn to.
 */
export function chooseCut(imageWidth, imageHeight, longest, patch, leastPatches) {
  const shrink = Math.min(1, longest / Math.max(imageWidth, imageHeight));
  const sides = [imageWidth, imageHeight].map((side) => Math.max(1, Math.round(side * shrink)));
  const [width, height] = sides.map((side) => side - (side % patch));
  const least = patch * leastPatches;
  if (Math.min(width, height) < least) {
    const got = `${sides[0]} x ${sides[1]}` + (shrink < 1 ? " once it is shrunk" : "");
    throw new Refused(`must have sides of ${least} pixels or more, got ${got}`);
  }
  const [left, top] = sides.map((side) => Math.floor((side % patch) / 2));
  const scaleX = imageWidth / sides[0];
  const scaleY = imageHeight / sides[1];
  return {
    left: left * scaleX,
    top: top * scaleY,
    right: (left + width) * scaleX,
    bottom: (top + height) * scaleY,
    width,
    height,
  };
}

/** Turn RGBA levels into planes `(3, H, W)` in [-1, 1], as the encoder takes them. */
export function toPlanes(levels) {
  const pixels = levels.length / 4;
  const planes = new Float32Array(3 * pixels);
  for (let i = 0; i < pixels; i++) {
    for (let colour = 0; colour < 3; colour++) {
      planes[colour * pixels + i] = levels[4 * i + colour] / 127.5 - 1;
    }
  }
  return planes;
}

/** Round planes `(3, planeHeight, planeWidth)` in [-1, 1] to RGBA levels of their left upper `width x height`. */
export function toLevels(planes, planeWidth, planeHeight, width, height) {
  const levels = new Uint8ClampedArray(4 * width * height).fill(255);
  for (let colour = 0; colour < 3; colour++) {
    for (let y = 0; y < height; y++) {
      const row = (colour * planeHeight + y) * planeWidth;
      for (let x = 0; x < width; x++) {
        levels[4 * (y * width + x) + colour] = (planes[row + x] + 1) * 127.5;
      }
    }
  }
  return levels;
}

/** Compute the PSNR of RGBA levels in dB over all pixels and colours; infinite for images that are equal. */
export function psnr(levels, others) {
  let squares = 0;
  for (let i = 0; i < levels.length; i++) {
    if (i % 4 !== 3) squares += (levels[i] - others[i]) ** 2;
  }
  return 10 * Math.log10(255 ** 2 / (squares / (0.75 * levels.length)));
}

const view = new DataView(new ArrayBuffer(4));

/** Round a number to the nearest float16, ties to even, and give its 16 bits. */
export function toHalf(value) {
  view.setFloat32(0, value);
  const bits = view.getUint32(0);
  const sign = (bits >>> 16) & 0x8000;
  const size = Math.abs(view.getFloat32(0));
  if (Number.isNaN(size)) return sign | 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  if (size < 2 ** -14) return sign | roundToEven(size * 2 ** 24);
  const kept = bits & 0x7fffffff;
  const rounded = (kept + 0xfff + ((kept >>> 13) & 1)) >>> 13;
  return sign | (rounded - (112 << 10));
}

function roundToEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  return rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? below + 1 : below;
}

/** Give the number that 16 bits of a float16 stand for. */
export function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}

function fromBrainHalf(bits) {
  view.setUint32(0, bits << 16);
  return view.getFloat32(0);
}

const SUFFIXES = /.\.(apng|bmp|dib|gif|jfif|jpe|jpeg|jpg|png|tif|tiff|webp)$/i;

/** Bytes of a number and its reader, by the names of dtypes in a safetensors file. */
const READERS = {
  F16: [2, (data, at) => fromHalf(data.getUint16(at, true))],
  BF16: [2, (data, at) => fromBrainHalf(data.getUint16(at, true))],
  F32: [4, (data, at) => data.getFloat32(at, true)],
};

/**
 * Write the latent `(C, h, w)` of an image as safetensors in float16, as `hieratok encode` writes a shard of one image:
 * the tensor has the image's name, and the `records` beside it say its size.
 */
export function writeLatent(name, latent, shape, width, height, model) {
  const key = SUFFIXES.test(name) ? name : `${name}.png`; // of which `hieratok decode` makes a file
  const records = JSON.stringify([{ name: key, width, height, box: [0, 0, width, height] }]);
  const header = { __metadata__: { records, model } };
  header[key] = { dtype: "F16", shape, data_offsets: [0, 2 * latent.length] };
  let head = new TextEncoder().encode(JSON.stringify(header));
  const padded = new Uint8Array(Math.ceil(head.length / 8) * 8).fill(32); // what follows begins at a multiple of 8
  padded.set(head);
  const file = new DataView(new ArrayBuffer(8 + padded.length + 2 * latent.length));
  new Uint8Array(file.buffer).set(padded, 8);
  file.setBigUint64(0, BigInt(padded.length), true);
  latent.forEach((value, i) => file.setUint16(8 + padded.length + 2 * i, toHalf(value), true));
  return new Uint8Array(file.buffer);
}

/**
 * Read the first latent of a safetensors file: `{name, latent, shape, width, height, count}`.
 *
 * `width` and `height` are those of the image, which the `records` of an archive give where its border was continued
 * to whole patches. Throws `Refused` for a file that is damaged, or is of another model.
 */
export function readLatent(buffer, { channels, patch, leastCells, mostCells }) {
  const file = new DataView(buffer);
  const header = readHeader(file);
  const entries = Object.entries(header.entries).filter(([name]) => name !== "__metadata__");
  if (!entries.length) throw new Refused("holds no latent");
  const [name, entry] = entries[0];
  const reader = READERS[entry?.dtype];
  if (!reader) throw new Refused(`must hold float16, bfloat16 or float32, got ${entry?.dtype}`);
  const [bytes, read] = reader;
  const { shape, data_offsets: offsets } = entry;
  const isShape = Array.isArray(shape) && shape.length === 3 && shape.every((n) => Number.isSafeInteger(n) && n > 0);
  if (!isShape || shape[0] !== channels) {
    throw new Refused(`must hold a latent of the shape ${channels} x rows x columns, got ${shapeText(shape)}`);
  }
  const [, rows, columns] = shape;
  if (Math.min(rows, columns) < leastCells || Math.max(rows, columns) > mostCells) {
    throw new Refused(`must have ${leastCells} to ${mostCells} rows and columns, got ${rows} x ${columns}`);
  }
  const count = channels * rows * columns;
  const [start, end] = Array.isArray(offsets) ? offsets : [];
  const isWhole = Number.isSafeInteger(start) && start >= 0 && end === start + bytes * count;
  if (!isWhole || header.end + end > file.byteLength) throw new Refused("is damaged: it is cut short");
  const latent = new Float32Array(count);
  for (let i = 0; i < count; i++) latent[i] = read(file, header.end + start + bytes * i);
  if (!latent.every(Number.isFinite)) throw new Refused("is damaged: it holds what is no number");
  const size = sizeOf(header.entries.__metadata__, name);
  const isInside = size && Math.ceil(size.width / patch) === columns && Math.ceil(size.height / patch) === rows;
  const { width, height } = isInside ? size : { width: columns * patch, height: rows * patch };
  return { name, latent, shape, width, height, count: entries.length };
}

function readHeader(file) {
  try {
    const end = 8 + Number(file.getBigUint64(0, true));
    const entries = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(file.buffer, 8, end - 8)));
    if (entries === null || typeof entries !== "object" || Array.isArray(entries)) throw new Error("no entries");
    return { end, entries };
  } catch {
    throw new Refused("is no safetensors file, or is damaged");
  }
}

function shapeText(shape) {
  return Array.isArray(shape) ? shape.join(" x ") || "a single number" : "none";
}

/** Find the size of the part that was encoded, if the records of an archive tell it. */
function sizeOf(metadata, name) {
  try {
    const record = JSON.parse(metadata.records).find((one) => one.name === name);
    const [left, top, right, bottom] = record.box;
    const size = { width: right - left, height: bottom - top };
    return Object.values(size).every((side) => Number.isSafeInteger(side) && side > 0) ? size : null;
  } catch {
    return null;
  }
}
