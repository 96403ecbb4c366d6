/** Keeps every file of the page once it was asked for, so that later visits need no network. */

// `make web` puts a checksum of all files here: a browser takes another text of this file for a new version.
const VERSION = "development";
const FIRST = ["./", "style.css", "app.js", "core.js", "worker.js", "icon.svg", "images/hat.webp", "images/jacket.webp"];
// With these a browser lends a page threads, which a static host seldom sends.
const ISOLATION = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

self.addEventListener("install", (event) => {
  event.waitUntil(Promise.all(FIRST.map((path) => keep(new Request(path, { cache: "no-cache" })))));
});

self.addEventListener("activate", (event) => {
  event.waitUntil(Promise.all([dropOthers(), self.clients.claim()]));
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && new URL(request.url).origin === self.location.origin) {
    event.respondWith(answer(request));
  }
});

async function dropOthers() {
  const names = await caches.keys();
  await Promise.all(names.filter((name) => name !== VERSION).map((name) => caches.delete(name)));
}

async function answer(request) {
  const kept = await caches.match(request, { cacheName: VERSION, ignoreSearch: true });
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
  const cache = await caches.open(VERSION);
  await cache.put(url.href, response.clone());
  return response;
}
