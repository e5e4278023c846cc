// A note beside what it is about, above everything else on the page, and its voice.

const STYLE = {
  position: "fixed",
  zIndex: "10000",
  maxWidth: "340px",
  padding: "6px 9px",
  font: "12px/1.4 system-ui, -apple-system, 'Segoe UI', sans-serif",
  color: "var(--fg-color)",
  background: "var(--comfy-menu-bg)",
  border: "1px solid var(--border-color)",
  borderRadius: "6px",
  boxShadow: "0 4px 16px rgba(0, 0, 0, 0.35)",
  pointerEvents: "none",
  overflowWrap: "anywhere",
};
const UNSEEN = "position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%)";
const EDGE = 8;

export class Tip {
  constructor(host) {
    this.voice = host.appendChild(document.createElement("span"));
    this.voice.style.cssText = UNSEEN;
    this.voice.setAttribute("aria-live", "polite");
    this.element = null;
  }

  get shown() {
    return this.element !== null;
  }

  /** Two or three lines above, else below, what lies at `spot` (in pixels of the window). */
  show(title, facts, small, spot) {
    this.element ??= this.make();
    const [head, body, foot] = this.element.children;
    head.textContent = title;
    body.textContent = facts;
    foot.textContent = small === title ? "" : small;
    const { offsetWidth: width, offsetHeight: height } = this.element;
    const middle = (spot.left + spot.right) / 2 - width / 2;
    const left = Math.max(EDGE, Math.min(middle, innerWidth - width - EDGE));
    const above = spot.top - height - EDGE;
    this.element.style.left = `${left}px`;
    this.element.style.top = `${above >= EDGE ? above : spot.bottom + EDGE}px`;
  }

  /** For people who cannot see it. */
  say(text) {
    this.voice.textContent = text;
  }

  hide() {
    this.element?.remove();
    this.element = null;
  }

  destroy() {
    this.hide();
    this.voice.remove();
  }

  make() {
    const element = document.body.appendChild(document.createElement("div"));
    element.className = "lora2-tip";
    element.setAttribute("role", "tooltip");
    Object.assign(element.style, STYLE);
    const [head, , foot] = ["div", "div", "div"].map((tag) =>
      element.appendChild(document.createElement(tag)),
    );
    head.style.fontWeight = "600";
    foot.style.cssText = "color: var(--descrip-text); font: 10px/1.4 ui-monospace, Menlo, monospace";
    return element;
  }
}
