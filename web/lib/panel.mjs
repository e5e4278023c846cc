// One training as a person sees it: how far it is, how well it learns, and what can be done.
import * as server from "./api.mjs";
import { Curve, inks } from "./curve.mjs";
import { HeatMap } from "./heatmap.mjs";
import { addStyle, make } from "./style.mjs";
import { bytes, duration, number, t } from "./text.mjs";

const AT_WORK = new Set(["queued", "running", "paused"]);
const ASK_AGAIN = 1000; // ms between two questions for what an event did not tell
const MOST_SAMPLES = 4;

export class Panel {
  constructor() {
    addStyle();
    this.id = null;
    this.job = null;
    this.ranks = null; // the newest told, until the components they belong to are known
    this.points = []; // told while the history is on its way
    this.asked = 0;
    this.element = make("section", "lora2-panel");
    this.element.dataset.testid = "lora2-panel";
    this.element.append(...this.build());
    this.curve = new Curve(this.curveHost, { label: t("curve_label") });
    this.map = new HeatMap(this.mapHost, { label: t("heatmap_label") });
  }

  /** Show the training of this short form; its history is fetched. */
  follow(job) {
    if (this.id !== job.id) {
      this.id = job.id;
      this.ranks = null;
      this.points = [];
      this.curve.total = 0;
      this.curve.set({ total: job.steps });
      this.map.set([]);
      this.mapHost.hidden = true;
      this.samples.hidden = true;
    }
    this.show(job);
    return this.fetch();
  }

  /** News of this training, as the server sends them. */
  hear({ job, ranks, points, sample }) {
    const before = this.job?.state;
    this.show(job);
    if (this.fetching) this.points.push(...(points ?? []));
    else this.curve.add(points ?? [], job.smoothed);
    if (ranks?.length) {
      this.ranks = ranks;
      if (!this.map.update(ranks)) this.fetchSoon();
    }
    const ended = before && before !== job.state && !AT_WORK.has(job.state);
    if (ended || (sample !== null && sample !== undefined)) this.fetchSoon();
  }

  /** Ask for the whole training; whatever happens meanwhile is added to the answer. */
  async fetch() {
    clearTimeout(this.later);
    this.later = null;
    this.asked = Date.now();
    const id = this.id;
    const mine = (this.fetching = Symbol(id));
    try {
      const told = await server.job(id);
      if (mine === this.fetching) this.take(told);
    } catch (error) {
      if (mine === this.fetching) this.say(t("unknown_error", { error: error.message }), true);
    } finally {
      if (mine === this.fetching) this.fetching = null;
    }
  }

  fetchSoon() {
    const wait = Math.max(0, this.asked + ASK_AGAIN - Date.now());
    this.later ??= setTimeout(() => this.fetch(), wait);
  }

  take(told) {
    // An event that came after the question may be newer than its answer.
    this.show(this.job && this.job.step > told.step && AT_WORK.has(told.state) ? this.job : told);
    const history = told.history ?? {};
    this.curve.set({ ...history, target_rank: told.target_rank, total: told.steps });
    this.curve.add(this.points, this.job.smoothed);
    this.points = [];
    this.show(this.job); // with a curve or without
    this.map.set(told.components ?? []);
    this.mapHost.hidden = !told.components?.length;
    if (this.ranks && AT_WORK.has(told.state)) this.map.update(this.ranks);
    this.showSamples(told.samples ?? []);
  }

  destroy() {
    clearTimeout(this.later);
    this.fetching = null;
    this.curve.destroy();
    this.map.destroy();
    this.element.remove();
  }

  // --- what is on it ---------------------------------------------------------------------------

  build() {
    this.state = make("span", "lora2-state");
    this.state.dataset.testid = "lora2-state";
    this.state.setAttribute("role", "status");
    this.name = make("span", "lora2-name");
    this.pauseButton = this.button("lora2-pause", () => this.pauseOrResume());
    this.stopButton = this.button("lora2-stop", () => this.tell("cancel"));
    const buttons = make("span", "lora2-buttons", this.pauseButton, this.stopButton);
    this.filled = make("div");
    this.bar = make("div", "lora2-bar", this.filled);
    this.bar.setAttribute("role", "progressbar");
    this.step = make("span");
    this.left = make("span");
    this.message = make("p", "lora2-message");
    this.message.setAttribute("role", "status");
    this.figures = Object.fromEntries(["loss", "mean_rank", "file_size"].map((k) => [k, figure()]));
    this.figureRow = make("div", "lora2-figures", ...Object.values(this.figures));
    this.curveHost = make("div");
    this.mapHost = make("div");
    this.samples = make("div", "lora2-samples");
    this.samples.dataset.testid = "lora2-samples";
    return [
      make("div", "lora2-head", this.state, this.name, buttons),
      this.bar,
      make("div", "lora2-line", this.step, this.left),
      this.message,
      this.figureRow,
      this.curveHost,
      this.mapHost,
      this.samples,
    ];
  }

  button(testid, act) {
    const button = make("button", "lora2-button");
    button.type = "button";
    button.dataset.testid = testid;
    button.addEventListener("click", act);
    // A press on a button is no grip on the node.
    button.addEventListener("pointerdown", (event) => event.stopPropagation());
    return button;
  }

  show(job) {
    this.job = job;
    const { state, step, steps } = job;
    const waits = state === "running" && job.waits;
    Object.assign(this.element.dataset, { jobState: state, jobId: job.id });
    write(this.state, t(`state_${waits ? "waiting" : state}`));
    write(this.name, job.name);
    this.name.title = job.file || job.name;
    write(this.step, t("step_of", { step: number(step), steps: number(steps) }));
    write(this.left, this.remaining(job));
    this.filled.style.width = `${steps ? (100 * step) / steps : 0}%`;
    const value = { valuemin: 0, valuemax: steps, valuenow: step, label: this.step.textContent };
    for (const [name, what] of Object.entries(value)) this.bar.setAttribute(`aria-${name}`, what);
    this.say(job.error || job.message || "", Boolean(job.error));
    this.showFigures(job);
    this.showButtons(job);
    this.curveHost.hidden = state !== "running" && !this.curve?.steps.length;
  }

  remaining({ state, position, seconds_left: seconds }) {
    if (state === "queued" && position) return t("place_in_queue", { position });
    if (state !== "running" || seconds === null || seconds === undefined) return "";
    return t("time_left", { time: duration(seconds) });
  }

  say(text, bad) {
    write(this.message, text);
    this.message.classList.toggle("lora2-bad", bad);
    this.message.hidden = !text;
  }

  showFigures(job) {
    const { loss, rank } = inks();
    const known = (value) => value !== null && value !== undefined;
    const of = (target, text) => (known(target) && target > 0 ? t("of_target", { target: text(target) }) : "");
    const rankText = (value) => number(value, 1);
    const facts = {
      loss: [known(job.smoothed ?? job.loss) ? number(job.smoothed ?? job.loss, 4) : "", "", loss],
      mean_rank: [known(job.mean_rank) ? rankText(job.mean_rank) : "", of(job.target_rank, rankText), rank],
      file_size: [known(job.bytes) ? bytes(job.bytes) : "", of(job.target_bytes, bytes), null],
    };
    for (const [key, [value, target, ink]] of Object.entries(facts)) {
      const shown = this.figures[key];
      const [[mark, name], [strong, rest]] = [...shown.children].map((line) => line.children);
      mark.hidden = !ink;
      mark.style.setProperty("--lora2-ink", ink ?? "");
      write(name, t(key));
      write(strong, value);
      write(rest, target);
      shown.hidden = !value;
    }
    this.figureRow.hidden = Object.values(this.figures).every((shown) => shown.hidden);
  }

  showButtons({ state, resumable }) {
    const going = state === "running" || state === "queued";
    const resume = state === "paused" || (!going && resumable);
    this.pauseButton.hidden = state !== "running" && !resume;
    write(this.pauseButton, t(resume ? "resume" : "pause"));
    this.pauseButton.title = t(resume ? "resume_hint" : "pause_hint");
    this.pauseButton.dataset.what = resume ? "resume" : "pause";
    this.stopButton.hidden = !AT_WORK.has(state);
    const none = state === "queued";
    write(this.stopButton, t(none ? "remove" : "stop"));
    this.stopButton.title = t(none ? "remove_hint" : "stop_hint");
  }

  showSamples(samples) {
    const newest = samples.at(-1);
    this.samples.hidden = !newest?.urls?.length;
    const key = newest ? `${this.id} ${newest.step} ${newest.urls.length}` : "";
    if (this.samples.hidden || key === this.shownSamples) return;
    this.shownSamples = key;
    const pictures = newest.urls.slice(0, MOST_SAMPLES).map((url, index) => {
      const link = make("a", "", make("img"));
      const prompt = newest.prompts?.[index];
      link.href = link.firstChild.src = server.pictureUrl(url);
      link.target = "_blank";
      link.title = prompt ?? "";
      link.firstChild.alt = prompt ?? t("sample", { number: index + 1, step: newest.step });
      return link;
    });
    const title = make("div", "lora2-title", t("samples", { step: number(newest.step) }));
    this.samples.replaceChildren(title, ...pictures);
  }

  // --- what can be done ------------------------------------------------------------------------

  pauseOrResume() {
    return this.tell(this.pauseButton.dataset.what);
  }

  async tell(what) {
    const buttons = [this.pauseButton, this.stopButton];
    for (const button of buttons) button.disabled = true;
    try {
      const job = await server.post(this.id, what);
      if (job.id === this.id) this.show(job);
    } catch (error) {
      this.say(error.message, true);
    } finally {
      for (const button of buttons) button.disabled = false;
    }
  }
}

function figure() {
  const lines = [[make("i"), make("span")], [make("b"), " ", make("span")]];
  return make("div", "lora2-figure", ...lines.map((parts) => make("div", "", ...parts)));
}

/** Change a text only where it differs: screen readers speak what is written. */
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
