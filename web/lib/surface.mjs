// A canvas that is sharp at every zoom, follows the theme and is drawn at most once a frame.

const MOST_PIXELS = 4; // device pixels for one of CSS; more cannot be seen and costs memory

let known = null; // the colours of now; null after a change of theme
const followers = new Set();

/** ComfyUI's colours as a canvas takes them: {text, faint, surface, line, dark}. */
export function theme() {
  if (known) return known;
  const style = getComputedStyle(document.documentElement);
  const read = (name, otherwise) => style.getPropertyValue(name).trim() || otherwise;
  const surface = read("--comfy-input-bg", "#222");
  const dark = luminance(surface) < 0.4;
  known = {
    text: read("--input-text", dark ? "#ddd" : "#222"),
    faint: read("--descrip-text", dark ? "#999" : "#444"),
    line: dark ? "rgba(255, 255, 255, 0.12)" : "rgba(0, 0, 0, 0.14)",
    surface,
    dark,
  };
  return known;
}

function luminance(colour) {
  const context = new OffscreenCanvas(1, 1).getContext("2d");
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  const [red, green, blue] = context.getImageData(0, 0, 1, 1).data;
  return (0.299 * red + 0.587 * green + 0.114 * blue) / 255;
}

function follow(surface) {
  if (!followers.size) observer.observe(document.documentElement, ATTRIBUTES);
  followers.add(surface);
}

function leave(surface) {
  followers.delete(surface);
  if (!followers.size) observer.disconnect();
  if (!followers.size) known = null; // nobody watches for changes now
}

const ATTRIBUTES = { attributes: true, attributeFilter: ["class", "style", "data-theme"] };
const observer = new MutationObserver(() => {
  known = null;
  for (const surface of followers) surface.request();
});

export class Surface {
  /** `draw(context, width, height, scale)` paints in CSS pixels; `height` is CSS pixels too. */
  constructor(host, { height, draw, testid }) {
    this.draw = draw;
    this.frame = 0;
    this.canvas = host.appendChild(document.createElement("canvas"));
    if (testid) this.canvas.dataset.testid = testid;
    this.canvas.className = "lora2-canvas";
    this.canvas.style.cssText = "display: block; width: 100%; min-width: 0;";
    this.setHeight(height);
    this.watch = new ResizeObserver(() => this.request());
    this.watch.observe(this.canvas);
    follow(this);
  }

  setHeight(height) {
    if (this.height === height) return;
    this.height = height;
    this.canvas.style.height = `${height}px`;
  }

  /** Draw at the next frame; many requests before it are one. */
  request() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.paint();
    });
  }

  /** Draw again if the zoom has changed since. */
  sharpen() {
    if (Math.abs(this.scale - this.pixels()) > 0.05) this.request();
  }

  paint() {
    const width = this.canvas.clientWidth;
    if (!width) return; // collapsed, or not in the page
    this.scale = this.pixels();
    const across = Math.round(width * this.scale);
    const down = Math.round(this.height * this.scale);
    if (this.canvas.width !== across) this.canvas.width = across;
    if (this.canvas.height !== down) this.canvas.height = down;
    const context = this.canvas.getContext("2d");
    context.setTransform(this.scale, 0, 0, this.scale, 0, 0);
    context.clearRect(0, 0, width, this.height);
    this.draw(context, width, this.height, this.scale);
  }

  /** Device pixels for one of CSS, the zoom of the graph included. */
  pixels() {
    const zoom = this.canvas.getBoundingClientRect().width / (this.canvas.offsetWidth || 1);
    return Math.min(MOST_PIXELS, Math.max(1, (devicePixelRatio || 1) * (zoom || 1)));
  }

  destroy() {
    cancelAnimationFrame(this.frame);
    this.frame = 1; // no request is heard any more
    this.watch.disconnect();
    leave(this);
    this.canvas.remove();
  }
}
