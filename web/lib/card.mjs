// One training in the side bar: how far it is, its buttons, and the card of the file it left.
import { icon, make, put } from "./sidebar_style.mjs";
import { bytes, define, duration, language, number, t } from "./text.mjs";

const ICONS = {
  queued: "pi-clock",
  running: "pi-play-circle",
  waiting: "pi-hourglass",
  paused: "pi-pause-circle",
  interrupted: "pi-exclamation-circle",
  finished: "pi-check-circle",
  stopped: "pi-stop-circle",
  failed: "pi-times-circle",
};
const ACTIVE = new Set(["queued", "running", "paused"]);

define({
  card_place: "Queued · {position}",
  card_steps: "{steps} steps",
  card_remove: "Remove from queue",
  card_stopping: "Stopping …",
  card_load: "Load in graph",
  card_load_hint: "Adds a loader with this LoRA to the graph, after its model",
  card_again_hint: "Queues its workflow again, which goes on after the last checkpoint",
  card_again: "Its workflow is queued; the training goes on when that runs.",
  card_trigger: "Trigger",
  card_gone: "The file is no longer there.",
  card_picture: "Show the picture of {name} larger",
  card_picture_of: "Picture of {name}",
  card_close: "Close",
  card_progress: "Progress of {name}",
});

/** `actions`: post(id, what), insert(file), look(job) → facts, and `seen`, a Map to keep these. */
export class JobRow {
  #stopping = false;
  #again = false; // an interrupted one whose workflow is queued
  #near = false;
  #facts = {};
  #looked = "";
  #pictures = [];

  constructor(job, actions) {
    this.actions = actions;
    this.element = make("li", "lora2-job", { tabIndex: -1 });
    this.element.dataset.testid = "lora2-job";
    this.#makeHead();
    this.#makeProgress();
    this.#makeCard();
    this.message = this.element.appendChild(make("p", "lora2-job-message"));
    this.trouble = this.element.appendChild(make("p", "lora2-job-error"));
    this.trouble.setAttribute("role", "alert");
    this.#makeButtons();
    this.update(job);
  }

  /** Show `job`; only what differs is touched. */
  update(job) {
    this.job = job;
    const shown = job.state === "running" && job.waits ? "waiting" : job.state;
    const { dataset } = this.element;
    Object.assign(dataset, { jobId: job.id, jobState: job.state });
    if (dataset.shown !== shown) {
      dataset.shown = shown;
      this.icon.className = `pi ${ICONS[shown] ?? "pi-circle"}`;
    }
    if (!ACTIVE.has(job.state)) this.#stopping = false;
    if (job.state !== "interrupted") this.#again = false;
    put(this.name, job.name);
    this.name.title = job.name;
    put(this.state, stateText(job, shown));
    this.#updateProgress(job);
    this.#updateCard(job);
    const news = this.#again ? t("card_again") : ACTIVE.has(job.state) ? job.message : "";
    put(this.message, job.error || news || "");
    this.message.classList.toggle("lora2-is-error", Boolean(job.error));
    this.#updateButtons(job);
  }

  /** The row has come into sight: find out what the list did not tell. */
  reveal() {
    this.#near = true;
    this.#look();
  }

  // --- parts ------------------------------------------------------------------------------------

  #makeHead() {
    const head = this.element.appendChild(make("div", "lora2-job-head"));
    this.icon = head.appendChild(icon("pi-circle"));
    this.name = head.appendChild(make("strong", "lora2-job-name"));
    this.state = head.appendChild(make("span", "lora2-job-state"));
  }

  #makeProgress() {
    this.bar = this.element.appendChild(make("div", "lora2-job-bar"));
    this.bar.setAttribute("role", "progressbar");
    this.bar.setAttribute("aria-valuemin", "0");
    this.fill = this.bar.appendChild(make("div"));
    this.facts = this.element.appendChild(make("div", "lora2-job-facts"));
    this.when = this.facts.appendChild(make("span"));
    this.step = this.facts.appendChild(make("span"));
    this.left = this.facts.appendChild(make("span"));
    this.loss = this.facts.appendChild(make("span"));
  }

  #makeCard() {
    this.card = this.element.appendChild(make("div", "lora2-card"));
    this.picture = this.card.appendChild(make("button", "lora2-card-picture", { type: "button" }));
    this.image = this.picture.appendChild(make("img", "", { alt: "", hidden: true }));
    this.image.decoding = "async";
    this.image.onload = () => this.#showPicture(true);
    this.image.onerror = () => this.#nextPicture();
    this.picture.onclick = () => openPicture(this.image.src, this.job.name);
    this.picture.hidden = true; // until there is one
    const list = this.card.appendChild(make("dl"));
    this.trigger = fact(list, "card_trigger");
    this.rank = fact(list, "mean_rank");
    this.size = fact(list, "file_size");
    this.gone = this.card.appendChild(make("p", "lora2-job-error", { hidden: true }));
  }

  #makeButtons() {
    this.buttons = this.element.appendChild(make("div", "lora2-job-buttons"));
    const add = (glyph, work) => this.buttons.appendChild(button(glyph, () => this.#do(work)));
    this.pause = add("pi-pause", () =>
      this.job.state === "running" ? this.actions.post(this.job.id, "pause") : this.#resume(),
    );
    this.stop = add("pi-stop", () => this.#cancel());
    this.load = add("pi-plus", () => this.actions.insert(this.job.file));
    this.load.dataset.testid = "lora2-load";
    this.pause.dataset.testid = "lora2-side-pause";
    this.stop.dataset.testid = "lora2-side-stop";
  }

  // --- what they show ---------------------------------------------------------------------------

  #updateProgress(job) {
    const done = job.state === "finished";
    this.bar.hidden = done || job.state === "queued";
    this.facts.hidden = job.state === "queued";
    const { step, steps } = job;
    this.bar.setAttribute("aria-valuemax", String(steps));
    this.bar.setAttribute("aria-valuenow", String(step));
    this.bar.setAttribute("aria-label", t("card_progress", { name: job.name }));
    const told = t("step_of", { step: number(step), steps: number(steps) });
    this.bar.setAttribute("aria-valuetext", told);
    this.fill.style.transform = `scaleX(${steps ? Math.min(1, step / steps) : 0})`;
    put(this.step, done ? t("card_steps", { steps: number(steps) }) : told);
    put(this.when, when(job));
    const left = job.state === "running" && job.seconds_left != null;
    put(this.left, left ? t("time_left", { time: duration(job.seconds_left) }) : "");
    const loss = job.smoothed ?? job.loss;
    put(this.loss, loss == null ? "" : t("loss_now", { loss: number(loss, 3) }));
  }

  #updateCard(job) {
    const kept = !ACTIVE.has(job.state) && Boolean(job.file);
    const grows = job.state === "running" || job.state === "paused";
    const { gone = false, trigger = "", rank = null, size = null } = kept ? this.#facts : {};
    put(this.trigger, trigger);
    this.trigger.title = trigger;
    const mean = job.mean_rank ?? rank;
    put(this.rank, mean == null ? "" : number(mean, 1));
    const file = job.bytes ?? size;
    put(this.size, file == null ? "" : bytes(file));
    const values = [this.trigger, this.rank, this.size];
    for (const value of values) value.parentElement.hidden = !value.textContent;
    this.card.hidden = !(kept || (grows && values.some((value) => value.textContent)));
    this.gone.hidden = !gone;
    put(this.gone, gone ? t("card_gone") : "");
    if (kept) this.#look();
  }

  #updateButtons(job) {
    const { name, state, file } = job;
    const active = ACTIVE.has(state);
    const again = state === "interrupted" && job.resumable && !this.#again;
    const key = state === "running" ? "pause" : "resume";
    say(this.pause, t(key), t(again ? "card_again_hint" : `${key}_hint`), name);
    this.pause.firstChild.className = state === "running" ? "pi pi-pause" : "pi pi-play";
    const removes = state === "queued";
    const stop = removes ? "card_remove" : this.#stopping ? "card_stopping" : "stop";
    say(this.stop, t(stop), removes ? "" : t("stop_hint"), name);
    this.stop.firstChild.className = removes ? "pi pi-times" : "pi pi-stop";
    this.stop.setAttribute("aria-disabled", String(this.#stopping));
    say(this.load, t("card_load"), t("card_load_hint"), name);
    const focused = this.buttons.contains(document.activeElement) ? document.activeElement : null;
    this.pause.hidden = !(state === "running" || state === "paused" || again) || this.#stopping;
    this.stop.hidden = !active;
    this.load.hidden = active || !file || !this.gone.hidden;
    this.buttons.hidden = this.pause.hidden && this.stop.hidden && this.load.hidden;
    if (focused?.hidden) this.#refocus();
  }

  /** Whoever works with the keyboard stays in this row when the button goes that was pressed. */
  #refocus() {
    const next = [this.stop, this.pause, this.load].find((one) => !one.hidden);
    (next ?? this.element).focus({ preventScroll: true });
  }

  // --- what they do -----------------------------------------------------------------------------

  async #do(work) {
    put(this.trouble, "");
    try {
      await work();
    } catch (error) {
      put(this.trouble, error.message);
    }
  }

  async #resume() {
    const again = this.job.state === "interrupted";
    await this.actions.post(this.job.id, "resume");
    this.#again = again;
    this.update(this.job);
  }

  async #cancel() {
    if (this.#stopping) return;
    this.#stopping = this.job.state !== "queued"; // the step that runs now is done first
    this.#updateButtons(this.job);
    try {
      await this.actions.post(this.job.id, "cancel");
    } catch (error) {
      this.#stopping = false;
      this.#updateButtons(this.job);
      throw error;
    }
  }

  async #look() {
    const { job, actions } = this;
    if (!this.#near || ACTIVE.has(job.state) || !job.file || this.#looked === job.file) return;
    this.#looked = job.file;
    const key = `${job.id} ${job.file}`;
    const facts = actions.seen.get(key) ?? (await actions.look(job));
    if (!facts.gone) actions.seen.set(key, facts);
    this.#facts = facts;
    this.#pictures = [...facts.pictures];
    this.#nextPicture();
    this.update(this.job);
  }

  #nextPicture() {
    const next = this.#pictures.shift();
    if (next) this.image.src = next;
    else this.#showPicture(false);
  }

  #showPicture(there) {
    this.image.hidden = this.picture.hidden = !there;
    if (there) this.picture.setAttribute("aria-label", t("card_picture", { name: this.job.name }));
  }
}

/** The picture as large as the window allows; Escape, the button and a click beside it close it. */
function openPicture(src, name) {
  const dialog = make("dialog", "lora2-zoom");
  const close = button("pi-times", () => dialog.close());
  say(close, t("card_close"), "", "");
  dialog.setAttribute("aria-label", t("card_picture_of", { name }));
  dialog.append(make("img", "", { src, alt: t("card_picture_of", { name }) }), close);
  dialog.onclick = ({ target }) => target === dialog && dialog.close();
  dialog.onkeydown = (event) => event.stopPropagation(); // ComfyUI's own keys are not meant
  dialog.onclose = () => dialog.remove();
  document.body.append(dialog);
  dialog.showModal();
}

function stateText(job, shown) {
  if (shown === "queued" && job.position) return t("card_place", { position: job.position });
  return t(`state_${shown}`);
}

/** The day and time at which a training that is over was begun. */
function when({ state, created }) {
  if (ACTIVE.has(state) || !created) return "";
  const options = { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" };
  return new Intl.DateTimeFormat(language(), options).format(new Date(created * 1000));
}

function fact(list, key) {
  const pair = list.appendChild(make("div"));
  pair.appendChild(make("dt", "", { textContent: t(key) }));
  return pair.appendChild(make("dd"));
}

function button(glyph, work) {
  const made = make("button", "lora2-side-button", { type: "button", onclick: work });
  made.append(icon(glyph), make("span"));
  return made;
}

/** Name a button: what is read aloud tells which training it is for, too. */
function say(made, text, hint, name) {
  put(made.lastChild, text);
  made.title = hint;
  made.setAttribute("aria-label", name ? `${text}: ${name}` : text);
}
