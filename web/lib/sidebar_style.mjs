// What the tab "LoRA²" is made of, in the colours of ComfyUI's theme and at any width.
const ID = "lora2-side-style";

const CSS = `
.lora2-side {
  --lora2-accent: var(--p-primary-color, #3b82f6);
  --lora2-good: color-mix(in srgb, #16a34a 65%, var(--fg-color));
  --lora2-warn: color-mix(in srgb, #d97706 65%, var(--fg-color));
  --lora2-bad: color-mix(in srgb, var(--error-text) 75%, var(--fg-color));
  container-type: inline-size;
  padding: 12px;
  font-size: 13px;
  line-height: 1.4;
  color: var(--fg-color);
}
.lora2-side [hidden] { display: none !important; }
.lora2-side h2 { margin: 0 0 12px; font-size: 15px; font-weight: 600; color: inherit; }
.lora2-side h3 {
  margin: 16px 0 6px; font-size: 12px; font-weight: 600; color: var(--descrip-text);
}
.lora2-side section:first-child h3 { margin-top: 0; }
.lora2-side p { margin: 0; }
.lora2-side ul { list-style: none; margin: 0; padding: 0; display: grid; gap: 8px; }
.lora2-side-leftovers {
  display: flex; flex-wrap: wrap; align-items: center; justify-content: space-between; gap: 4px 8px;
  margin-top: 16px; font-size: 12px; color: var(--descrip-text);
}
.lora2-side-note {
  display: grid; justify-items: center; gap: 8px; padding: 32px 8px; text-align: center;
}
.lora2-side-note p { max-width: 30em; color: var(--descrip-text); text-wrap: pretty; }
.lora2-side-note > .pi { font-size: 28px; color: var(--descrip-text); }
.lora2-side-note .lora2-side-button { margin-top: 8px; }
.lora2-job {
  display: grid; gap: 6px; min-width: 0; padding: 10px;
  border: 1px solid color-mix(in srgb, var(--border-color) 60%, transparent);
  border-radius: 8px; background: var(--comfy-menu-bg);
  content-visibility: auto; contain-intrinsic-size: auto 150px;
}
.lora2-job-head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 6px; min-width: 0; }
.lora2-job-head > .pi { align-self: center; font-size: 14px; color: var(--descrip-text); }
.lora2-job-name {
  flex: 1 0 7em; min-width: 0; max-width: calc(100% - 20px); font-weight: 600;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
}
.lora2-job-state { flex: none; font-size: 12px; color: var(--descrip-text); }
.lora2-job[data-shown="running"] .lora2-job-head > .pi { color: var(--lora2-accent); }
.lora2-job[data-shown="finished"] .lora2-job-head > .pi { color: var(--lora2-good); }
.lora2-job[data-shown="failed"] :is(.lora2-job-head > .pi, .lora2-job-state) {
  color: var(--lora2-bad);
}
.lora2-job:is([data-shown="interrupted"], [data-shown="paused"], [data-shown="waiting"])
  :is(.lora2-job-head > .pi, .lora2-job-state) { color: var(--lora2-warn); }
.lora2-job-bar {
  height: 4px; border-radius: 2px; overflow: hidden;
  background: color-mix(in srgb, var(--fg-color) 15%, transparent);
}
.lora2-job-bar > div {
  height: 100%; transform-origin: left; background: var(--descrip-text);
  transition: transform 0.3s linear;
}
.lora2-job[data-shown="running"] .lora2-job-bar > div { background: var(--lora2-accent); }
.lora2-job-facts {
  display: flex; flex-wrap: wrap; gap: 0 12px; font-size: 12px; color: var(--descrip-text);
  font-variant-numeric: tabular-nums;
}
.lora2-job-facts > span:empty, .lora2-job > p:empty { display: none; }
.lora2-job-message {
  font-size: 12px; color: var(--descrip-text); overflow-wrap: anywhere;
  max-height: 12em; overflow-y: auto; white-space: pre-line;
}
.lora2-job-message.lora2-is-error, .lora2-job-error { font-size: 12px; color: var(--lora2-bad); }
.lora2-card { display: flex; flex-wrap: wrap; gap: 10px; min-width: 0; }
.lora2-card-picture {
  flex: none; width: 72px; height: 72px; padding: 0; border: 0; border-radius: 6px;
  overflow: hidden; background: var(--comfy-input-bg); cursor: zoom-in;
  box-shadow: 0 0 0 1px color-mix(in srgb, var(--border-color) 60%, transparent);
}
.lora2-card .lora2-job-error { flex: 1 0 100%; }
.lora2-card-picture img { width: 100%; height: 100%; object-fit: cover; display: block; }
.lora2-card dl {
  flex: 1; min-width: 0; margin: 0; display: grid; align-content: center; gap: 2px;
  font-size: 12px; font-variant-numeric: tabular-nums;
}
.lora2-card dl > div { display: flex; gap: 6px; min-width: 0; }
.lora2-card:has(> .lora2-card-picture[hidden]) dl { display: flex; flex-wrap: wrap; gap: 0 12px; }
.lora2-card dt { flex: none; color: var(--descrip-text); }
.lora2-card dd {
  min-width: 0; margin: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  user-select: text;
}
.lora2-job-buttons { display: flex; flex-wrap: wrap; gap: 6px; }
.lora2-side-button {
  display: inline-flex; align-items: center; justify-content: center; gap: 6px;
  min-height: 28px; padding: 3px 10px; border: 1px solid transparent; border-radius: 6px;
  font: inherit; font-size: 12px; color: var(--fg-color); cursor: pointer;
  background: color-mix(in srgb, var(--fg-color) 10%, transparent);
}
.lora2-side-button > .pi { font-size: 11px; }
.lora2-side-button:hover { background: color-mix(in srgb, var(--fg-color) 18%, transparent); }
.lora2-side-button[aria-disabled="true"] { cursor: default; opacity: 0.6; }
.lora2-side :focus-visible, .lora2-zoom :focus-visible {
  outline: 2px solid var(--p-primary-color, #3b82f6); outline-offset: 1px;
}
@container (max-width: 280px) {
  .lora2-job-buttons .pi { display: none; }
}
@container (min-width: 340px) {
  .lora2-card-picture { width: 96px; height: 96px; }
}
.lora2-zoom {
  max-width: 94vw; max-height: 94vh; padding: 0; border: 0; border-radius: 8px;
  overflow: hidden; box-shadow: none;
  background: var(--comfy-menu-bg); color: var(--fg-color);
}
.lora2-zoom::backdrop { background: rgb(0 0 0 / 70%); }
.lora2-zoom img { display: block; max-width: 94vw; max-height: 94vh; }
.lora2-zoom .lora2-side-button {
  position: absolute; top: 8px; right: 8px; background: var(--comfy-menu-bg);
}
@media (prefers-reduced-motion: reduce) {
  .lora2-job-bar > div { transition: none; }
}
`;

/** Once for the page, however often it is called. */
export function addStyle() {
  if (document.getElementById(ID)) return;
  const style = document.createElement("style");
  style.id = ID;
  style.textContent = CSS;
  document.head.append(style);
}

export function make(tag, className = "", properties = {}) {
  return Object.assign(document.createElement(tag), className ? { className } : {}, properties);
}

/** An icon of ComfyUI's, which only repeats what is said beside it. */
export function icon(name) {
  const shown = make("i", `pi ${name}`);
  shown.setAttribute("aria-hidden", "true");
  return shown;
}

/** Change a text only where it differs: what stays need not be drawn again. */
export function put(where, text) {
  if (where.textContent !== text) where.textContent = text;
}
