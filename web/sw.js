/** Keeps every file of the page once it was asked for, so that later visits need no network. */

// `make web` puts a checksum of all files here: a browser takes another text of this file for a new version.
const VERSION = "development";
const FIRST = ["./", "style.css", "app.js", "core.js", "worker.js", "icon.svg", "images/hat.webp", "images/jacket.webp"];
// Other pages may share the origin and its caches.
const OURS = `hieratok ${self.registration.scope} `;
const CACHE = OURS + VERSION;
// With these a browser lends a page threads, which a static host seldom sends.
const ISOLATION = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

self.addEventListener("install", (event) => event.waitUntil(keepAll()));

self.addEventListener("activate", (event) => {
  event.waitUntil(Promise.all([dropOthers(), self.clients.claim()]));
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && new URL(request.url).origin === self.location.origin) {
    event.respondWith(answer(request));
  }
});

async function findCaches() {
  return (await caches.keys()).filter((name) => name.startsWith(OURS));
}

/** Keep what the page begins with, and of a new version what was kept of the one before. */
async function keepAll() {
  const urls = new Set(FIRST.map((path) => new URL(path, self.location).href));
  for (const name of await findCaches()) {
    const cache = await caches.open(name);
    for (const { url } of await cache.keys()) urls.add(url);
  }
  await Promise.all([...urls].map((url) => keep(new Request(url, { cache: "no-cache" }))));
}

async function dropOthers() {
  const names = await findCaches();
  await Promise.all(names.filter((name) => name !== CACHE).map((name) => caches.delete(name)));
}

async function answer(request) {
  const kept = await caches.match(request, { cacheName: CACHE, ignoreSearch: true });
  return kept ?? keep(request);
}

async function keep(request) {
  const found = await fetch(request);
  if (!found.ok) return found;
  const headers = new Headers(found.headers);
  for (const [name, value] of Object.entries(ISOLATION)) headers.set(name, value);
  const response = new Response(found.body, { status: found.status, statusText: found.statusText, headers });
  const url = new URL(request.url);
  url.search = "";
  const cache = await caches.open(CACHE);
  await cache.put(url.href, response.clone());
  return response;
}
