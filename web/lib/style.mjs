// How panels look, from ComfyUI's own colours, so that they fit every theme.

const CSS = `
.lora2-frame { width: 100%; min-width: 0; overflow: hidden; }
.lora2-panel {
  box-sizing: border-box; width: 100%; padding: 10px 12px 12px; display: flex;
  flex-direction: column; gap: 8px; border-radius: 8px; text-align: left;
  background: var(--comfy-input-bg); color: var(--input-text);
  font: 12px/1.4 system-ui, -apple-system, "Segoe UI", sans-serif;
  font-variant-numeric: tabular-nums;
}
[data-node-id] .lora2-panel { /* Nodes 2.0: as its fields */
  background: var(--component-node-widget-background, var(--comfy-input-bg));
}
.lora2-panel [hidden] { display: none; }
.lora2-head, .lora2-line { display: flex; align-items: center; gap: 8px; min-width: 0; }
.lora2-line { justify-content: space-between; color: var(--descrip-text); margin-top: -3px; }
.lora2-state { display: inline-flex; align-items: center; gap: 7px; font-weight: 600; flex: none; }
.lora2-state::before {
  content: ""; width: 8px; height: 8px; border-radius: 50%; background: var(--lora2-mark);
}
.lora2-thumb { flex: none; width: 56px; height: 56px; object-fit: cover; border-radius: 4px; }
.lora2-name {
  flex: 1; min-width: 0; color: var(--descrip-text); overflow: hidden; white-space: nowrap;
  text-overflow: ellipsis;
}
.lora2-panel { --lora2-mark: #8a8f98; }
.lora2-panel[data-job-state="running"] { --lora2-mark: #3d8bff; }
.lora2-panel[data-job-state="paused"] { --lora2-mark: #e0a100; }
.lora2-panel[data-job-state="finished"] { --lora2-mark: #2fa866; }
.lora2-panel[data-job-state="failed"] { --lora2-mark: var(--error-text); }
.lora2-buttons { display: flex; gap: 6px; flex: none; }
.lora2-button {
  height: 26px; padding: 0 10px; border-radius: 6px; cursor: pointer; white-space: nowrap;
  border: 1px solid var(--border-color); background: var(--comfy-menu-bg);
  color: var(--input-text); font: inherit; line-height: 1;
}
.lora2-button:hover:not(:disabled) { border-color: var(--input-text); }
.lora2-button:focus-visible, .lora2-samples a:focus-visible, .lora2-canvas:focus-visible {
  outline: 2px solid #3d8bff; outline-offset: 2px;
}
.lora2-canvas { border-radius: 2px; }
.lora2-button:disabled { opacity: 0.5; cursor: default; }
.lora2-bar {
  height: 4px; border-radius: 2px; overflow: hidden;
  background: color-mix(in srgb, var(--input-text) 15%, transparent);
}
.lora2-bar > div { height: 100%; border-radius: 2px; background: var(--lora2-mark); }
.lora2-message {
  margin: 0; color: var(--descrip-text); overflow-wrap: anywhere; user-select: text;
  white-space: pre-line; max-height: 84px; overflow: auto;
}
.lora2-notes {
  box-sizing: border-box; width: 100%; margin: 0; padding: 6px 12px; max-height: 200px;
  overflow: auto; overflow-wrap: anywhere; white-space: pre-wrap; user-select: text;
  text-align: left; color: var(--input-text);
  font: 12px/1.4 system-ui, -apple-system, "Segoe UI", sans-serif;
}
.lora2-message.lora2-bad { color: color-mix(in srgb, var(--error-text) 65%, var(--input-text)); }
.lora2-figures { display: grid; grid-template-columns: 1fr 1.2fr 1.45fr; gap: 8px; }
.lora2-figure { min-width: 0; line-height: 1.35; }
.lora2-figure > div { overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
.lora2-figure span { color: var(--descrip-text); }
.lora2-figure i {
  display: inline-block; width: 10px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; background: var(--lora2-ink);
}
.lora2-figure b { font-weight: 600; font-size: 13px; }
.lora2-title { margin: 2px 0 -2px; color: var(--descrip-text); }
.lora2-samples { display: grid; grid-template-columns: repeat(4, 1fr); gap: 6px; }
.lora2-samples > .lora2-title { grid-column: 1 / -1; }
.lora2-samples a { display: block; border-radius: 4px; }
.lora2-samples img {
  display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 4px;
  background: color-mix(in srgb, var(--input-text) 10%, transparent);
}
`;

/** Put the rules into the page, once. */
export function addStyle() {
  if (document.getElementById("lora2-style")) return;
  const style = document.head.appendChild(document.createElement("style"));
  style.id = "lora2-style";
  style.textContent = CSS;
}

/** An element with a class, and what it contains. */
export function make(tag, className, ...inside) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...inside);
  return element;
}
