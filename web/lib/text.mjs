// What people read, in the language ComfyUI is set to; in English where that has no words for it.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const english = {
  state_queued: "Queued",
  state_running: "Training",
  state_waiting: "Waiting for a prompt",
  state_paused: "Paused",
  state_interrupted: "Interrupted",
  state_finished: "Finished",
  state_stopped: "Stopped",
  state_failed: "Failed",
  place_in_queue: "number {position} in the queue",
  step_of: "step {step} of {steps}",
  time_left: "{time} left",
  seconds: "{count} s",
  minutes: "{count} min",
  hours: "{hours} h {minutes} min",
  loss: "Loss",
  loss_now: "Loss {loss}",
  mean_rank: "Mean rank",
  file_size: "File",
  of_target: "of {target}",
  stop: "Stop and keep",
  stop_hint: "Ends after this step and saves what was learnt as a LoRA",
  remove: "Remove from the queue",
  remove_hint: "It has not begun; nothing is lost",
  pause: "Pause",
  pause_hint: "Waits after this step; the model stays in memory",
  resume: "Resume",
  resume_hint: "Goes on where the training is",
  curve_label: "Loss and mean rank over the steps",
  curve_summary: "{points} points, loss {loss}, mean rank {rank}",
  curve_empty: "The curve begins with the first step.",
  heatmap_label: "Ranks of the layers; arrow keys go from one to the next",
  heatmap_empty: "No ranks yet.",
  self_attention: "Self-attention",
  cross_attention: "Cross-attention",
  rank: "rank {rank}",
  rank_scale: "rank",
  rank_of: "rank {rank} of {most}",
  ranks: "Ranks",
  samples: "Samples at step {step}",
  sample: "Sample {number} at step {step}",
  inspect_text: "Ranks of this LoRA",
  unknown_error: "The server did not answer: {error}",
};

let found = {};

/** Resolved once the words of all languages are here; `t` works before, in English. */
export const ready = (async () => {
  try {
    const reply = await api.fetchApi("/i18n");
    found = reply.ok ? await reply.json() : {};
  } catch {
    found = {}; // English is in this file
  }
})();

/** Add words of another module, as {key: "text with {value}"}. */
export function define(words) {
  Object.assign(english, words);
}

/** The text of `key`, its {names} replaced by `values`. */
export function t(key, values = {}) {
  const text = look(language(), key) ?? look("en", key) ?? english[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** The language as ComfyUI writes it, such as "en" or "zh-TW". */
export function language() {
  return app.extensionManager?.setting?.get("Comfy.Locale") || "en";
}

/** A number as people of this language write it. */
export function number(value, digits = 0) {
  return new Intl.NumberFormat(language(), {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  }).format(value);
}

/** Bytes as a file manager shows them. */
export function bytes(count) {
  if (count < 1e6) return `${number(count / 1e3, count < 1e4 ? 1 : 0)} kB`;
  if (count < 1e9) return `${number(count / 1e6, count < 1e8 ? 1 : 0)} MB`;
  return `${number(count / 1e9, 2)} GB`;
}

/** A time to wait, in the two units that matter. */
export function duration(seconds) {
  if (seconds < 90) return t("seconds", { count: Math.max(0, Math.round(seconds)) });
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return t("minutes", { count: minutes });
  return t("hours", { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
}

function look(code, key) {
  const text = found[code]?.lora2?.[key] ?? found[code.split("-")[0]]?.lora2?.[key];
  return typeof text === "string" ? text : undefined;
}
