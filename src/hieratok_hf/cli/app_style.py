"""Write the words, the looks and the scripts of the page of `hieratok app`."""

from .app_views import MAX_BYTES, MAX_PIXELS, MAX_SIDE

INTRODUCTION = """# HieraTok
Images as few numbers, and back: an independent implementation of [arXiv 2509.23736](https://arxiv.org/abs/2509.23736).
These weights are small and were trained on a CPU."""
LIMITS = f"""Files of up to {MAX_BYTES / 2**20:.0f} MB and {MAX_PIXELS / 1e6:.0f} megapixels. An image with a side of
more than {MAX_SIDE} pixels is made smaller first. Your file is removed once it is read, and shown to nobody else; the
image stays in memory for about an hour, for the other model."""
ABOUT_MODELS = {"hieratok-tiny": "more details", "hieratok-tiny-16x": "smaller files, fewer details"}
# Gradio's own text in these colours is too pale to be read with ease.
COLOURS = {
    "body_text_color_subdued": "*neutral_500",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_hover_dark": "*primary_800",
}
# Generated images have few pixels: they are shown as they are, not smoothed. While something is made, nothing else can
# be asked for, which might be ready before it and be replaced by it.
CSS = """
body:not(.dark) [role=tab].selected { color: var(--primary-700); }
footer .show-api-divider { display: none !important; }
#view { position: relative; max-height: 80vh; overflow: hidden; border-radius: 8px; }
#view > img { width: 100%; display: block; visibility: hidden; }
#window { position: absolute; inset: 0; overflow: auto; }
#pair { position: relative; width: calc(100% * var(--zoom)); cursor: ew-resize; touch-action: pan-y pinch-zoom; }
#pair { --border: calc(var(--left) + var(--at) / var(--zoom)); }
#pair.enlarged { touch-action: auto; image-rendering: pixelated; }
#pair img { width: 100%; display: block; user-select: none; }
#pair img:last-of-type { position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--border)) 0 0); }
#pair div { position: absolute; inset: 0 auto 0 calc(var(--border) - 1px); width: 2px; background: #fff; }
#pair div { box-shadow: 0 0 3px #000; pointer-events: none; }
#pair div::after { content: "↔"; position: sticky; top: calc(50% - 16px); display: block; margin-left: -15px; }
#pair div::after { width: 32px; border-radius: 50%; background: #fff; color: #000; }
#pair div::after { line-height: 32px; text-align: center; }
#compare .progress-text { position: static; order: 1; transform: none; border-radius: 4px; }
#compare .progress-text { background: var(--block-background-fill); }
#compare .pending { opacity: 0.4; }
body:has(#compare .pending) :is(#file, #examples, #model) { pointer-events: none; opacity: 0.4; }
#examples > .gallery { display: grid; grid-template-columns: repeat(4, 1fr); }
#examples span { display: block; width: 100%; }
#examples .container { width: 100%; height: auto; aspect-ratio: 4 / 3; max-width: none; max-height: none; }
#examples .container img { width: 100%; height: 100%; max-width: none; object-fit: cover; }
#files { display: none; }
#sides { display: flex; justify-content: space-between; gap: 16px; margin: 4px 0 8px; }
#sides span:last-child { text-align: right; }
#handles { display: flex; flex-wrap: wrap; gap: 8px 24px; }
#handles label { display: flex; flex: 1 1 200px; gap: 8px; align-items: center; }
#handles input { flex: 1; min-width: 0; accent-color: var(--color-accent); }
#generated img { image-rendering: pixelated; }
#figures table { width: 100%; }
#figures th { text-align: left; overflow-wrap: anywhere; }
#figures td, #figures th { border-color: var(--border-color-primary) !important; }
#figures td:first-child { white-space: nowrap; }
#message { border-left: 4px solid #dc2626; padding-left: 12px; }
@media (max-width: 640px) { .grid-container { grid-template-columns: 1fr 1fr !important; } }
"""
# It takes what the gallery shows, and the index of what shall stand on the right; sliders stay where they are. The
# last image is not seen: it gives the view the size that it has without zoom.
COMPARE = """(shown, index) => {
    if (!shown?.length) return "";
    const right = shown[index] ?? shown[1];
    const held = (name, first) => document.querySelector(`#compare input[name=${name}]`)?.value ?? first;
    const at = held("at", 50), zoom = held("zoom", 1);
    return `<div id="view">
        <div id="window" tabindex="0" role="group" aria-label="Both images">
            <div id="pair" class="${zoom > 1 ? "enlarged" : ""}" style="--at: ${at}%; --zoom: ${zoom}; --left: 0px">
                <img src="${right.image.url}" alt="${right.caption}" draggable="false">
                <img src="${shown[0].image.url}" alt="${shown[0].caption}" draggable="false"><div></div>
            </div>
        </div>
        <img src="${shown[0].image.url}" alt="">
    </div>
    <div id="sides"><span>${shown[0].caption}</span><span>${right.caption}</span></div>
    <div id="handles">
        <label>Slide <input type="range" name="at" value="${at}"></label>
        <label>Zoom <input type="range" name="zoom" min="1" max="4" step="0.5" value="${zoom}"></label>
    </div>`;
}"""
# The border between the images follows a mouse or a finger on them as it follows the handle. It stays where it is in
# the view, and the centre of the view on the same spot, when the zoom changes or other images come.
HANDLES = """
let centre = [0.5, 0.5];
const parts = () => [element.querySelector("#window"), element.querySelector("#pair")];
const look = () => {
    const [view, pair] = parts();
    pair.style.setProperty("--left", view.scrollLeft + "px");
    centre = [(view.scrollLeft + view.clientWidth / 2) / view.scrollWidth,
              (view.scrollTop + view.clientHeight / 2) / view.scrollHeight];
};
const place = () => {
    const [view, pair] = parts();
    view.scrollLeft = centre[0] * view.scrollWidth - view.clientWidth / 2;
    view.scrollTop = centre[1] * view.scrollHeight - view.clientHeight / 2;
    look();
};
const point = (event) => {
    if (!event.target.closest("#pair") || !event.buttons) return;
    const [view, pair] = parts();
    const handle = element.querySelector("input[name=at]");
    handle.value = 100 * (event.clientX - view.getBoundingClientRect().left) / view.clientWidth;
    pair.style.setProperty("--at", handle.value + "%");
};
element.addEventListener("pointerdown", point);
element.addEventListener("pointermove", point);
element.addEventListener("scroll", look, true);
element.addEventListener("load", () => {
    if ([...element.querySelectorAll("#view img")].every((image) => image.complete)) place();
}, true);
element.addEventListener("input", (event) => {
    const [view, pair] = parts();
    if (event.target.name === "at") pair.style.setProperty("--at", event.target.value + "%");
    if (event.target.name === "zoom") {
        pair.style.setProperty("--zoom", event.target.value);
        pair.classList.toggle("enlarged", event.target.value > 1);
        place();
    }
});
"""
