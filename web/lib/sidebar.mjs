// The tab "LoRA²": every training of this server, in the background or not, and what it left.
import * as api from "./api.mjs";
import { JobRow } from "./card.mjs";
import { insertLoader } from "./insert.mjs";
import { Leftovers } from "./leftovers.mjs";
import { addStyle, icon, make, put } from "./sidebar_style.mjs";
import { bytes, define, number, ready, t } from "./text.mjs";

const TAB = "lora2";
const ACTIVE = new Set(["queued", "running", "paused"]);
const TOAST_MS = 8000;
const RELOAD_MS = 400; // one question for several news
const MANY = 8; // reports are drawn by the server: not a hundred at once, on opening the tab

define({
  sidebar_title: "LoRA² trainings",
  sidebar_now: "In progress",
  sidebar_earlier: "Earlier",
  sidebar_empty: "No trainings yet",
  sidebar_empty_hint:
    "Add the node “Train LoRA² on images”, connect a model and your photos, and press Run. " +
    "With its setting run on “background” it trains here while you go on working.",
  sidebar_templates: "Browse templates",
  sidebar_retry: "Try again",
  sidebar_ended: "The LoRA {name} is ready",
  sidebar_ended_hint: "Mean rank {rank}, {size}. The tab LoRA² adds it to your graph.",
  sidebar_stopped: "Training {name} was stopped",
  sidebar_stopped_hint: "What it had learnt by step {step} is saved.",
  sidebar_failed: "Training {name} failed",
  sidebar_not_connected: "The loader is in the graph",
  sidebar_not_connected_hint:
    "Connect its model input: no loader of a model was selected, nor is there just one.",
  sidebar_trouble: "That did not work",
});

/** Put the tab into the side bar of ComfyUI; to be called once, from an extension's setup. */
export function registerSidebar(app) {
  addStyle();
  const jobs = new Jobs(app);
  app.extensionManager.registerSidebarTab({
    id: TAB,
    icon: "pi pi-chart-line",
    title: "LoRA²",
    label: "LoRA²",
    tooltip: "LoRA²",
    type: "custom",
    render: (host) => jobs.show(host),
    destroy: () => jobs.hide(),
  });
  api.onProgress(({ job }) => jobs.hear(job));
  api.onReconnected(() => jobs.load());
  jobs.load();
}

/** What is known of all trainings, kept up to date whether the tab is open or not. */
class Jobs {
  known = new Map();
  checkpoints = null; // {count, bytes} of those that no training needs
  error = null;
  loaded = false;
  heard = new Set(); // while a list is on its way: events are newer than it
  view = null;
  #timer = 0;

  constructor(app) {
    this.app = app;
    this.actions = {
      post: (id, what) => this.post(id, what),
      insert: (file) => this.insert(file),
      look: limited(look, MANY),
      seen: new Map(), // what cards found out, for when the tab is opened again
    };
  }

  show(host) {
    this.hide();
    this.view = new JobList(host, this);
    ready.then(() => this.view?.draw());
  }

  hide() {
    this.view?.destroy();
    this.view = null;
  }

  async load() {
    this.heard.clear();
    try {
      const { jobs: found, checkpoints } = await api.overview();
      this.checkpoints = checkpoints;
      const ids = new Set(found.map((job) => job.id));
      const gone = (id) => !ids.has(id) && !this.heard.has(id);
      [...this.known.keys()].filter(gone).forEach((id) => this.known.delete(id));
      for (const job of found) if (!this.heard.has(job.id)) this.take(job, this.loaded);
      this.loaded = true;
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    this.badge();
    this.view?.draw();
  }

  hear(job) {
    this.heard.add(job.id);
    this.take(job, true);
    this.badge();
    this.view?.update(job);
  }

  take(job, tell) {
    const before = this.known.get(job.id);
    this.known.set(job.id, job);
    // A new one may go on with an interrupted one, which is gone then.
    if (tell && !before && this.some("interrupted")) this.loadSoon();
    const ended = !ACTIVE.has(job.state) && (before ? ACTIVE.has(before.state) : tell);
    if (!ended || job.state === "interrupted") return;
    if (job.background && tell) this.announce(job);
    // Those behind it have moved up, of which no event tells; what was stopped left a checkpoint.
    if (this.some("queued") || job.state !== "finished") this.loadSoon();
  }

  some(state) {
    return [...this.known.values()].some((job) => job.state === state);
  }

  loadSoon() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.load(), RELOAD_MS);
  }

  async post(id, what) {
    const job = await api.post(id, what);
    if (job?.id) this.hear(job);
    this.loadSoon(); // an interrupted training goes on under another name
  }

  async clearCheckpoints() {
    try {
      this.checkpoints = await api.clearCheckpoints();
    } catch (error) {
      this.toast("error", "sidebar_trouble", error.message);
    }
    this.view?.draw();
  }

  async insert(file) {
    try {
      const { connected } = await insertLoader(this.app, file);
      if (!connected) this.toast("info", "sidebar_not_connected", t("sidebar_not_connected_hint"));
    } catch (error) {
      this.toast("error", "sidebar_trouble", error.message);
    }
  }

  announce(job) {
    const { name, step, state } = job;
    if (state === "failed") {
      this.toast("error", "sidebar_failed", job.error ?? "", { name });
    } else if (state === "finished") {
      const values = { rank: rank(job), size: job.bytes == null ? "–" : bytes(job.bytes) };
      this.toast("success", "sidebar_ended", t("sidebar_ended_hint", values), { name });
    } else if (job.file) {
      const detail = t("sidebar_stopped_hint", { step: number(step) });
      this.toast("info", "sidebar_stopped", detail, { name });
    }
    if (job.file) this.refreshLists();
  }

  /** Offer the new file in the nodes that are there. */
  async refreshLists() {
    try {
      await this.app.refreshComboInNodes();
    } catch (error) {
      console.warn("LoRA²: the lists of LoRAs are as before:", error); // R does the same
    }
  }

  toast(severity, key, detail, values = {}) {
    const life = severity === "error" ? undefined : TOAST_MS; // an error stays until it is read
    this.app.extensionManager.toast.add({ severity, summary: t(key, values), detail, life });
  }

  /** The number of trainings under way, on the tab's icon. */
  badge() {
    const active = [...this.known.values()].filter((job) => ACTIVE.has(job.state)).length;
    const tab = this.app.extensionManager.getSidebarTabs?.().find(({ id }) => id === TAB);
    if (tab) tab.iconBadge = active ? String(active) : null;
  }
}

/** The open tab: rows are made once, and from then on only changed where something changed. */
class JobList {
  rows = new Map();
  #drawn = false;

  constructor(host, jobs) {
    this.jobs = jobs;
    this.root = make("div", "lora2-side");
    this.heading = make("h2");
    this.list = make("div");
    this.list.dataset.testid = "lora2-jobs";
    this.now = section();
    this.earlier = section();
    this.list.append(this.now.root, this.earlier.root);
    this.note = make("div", "lora2-side-note", { hidden: true });
    this.leftovers = new Leftovers(() => jobs.clearCheckpoints());
    this.root.append(this.heading, this.note, this.list, this.leftovers.root);
    host.replaceChildren(this.root);
    this.watch = new IntersectionObserver((seen) => {
      for (const { isIntersecting, target } of seen) if (isIntersecting) target.lora2Row.reveal();
    });
  }

  destroy() {
    this.watch.disconnect();
    this.root.remove();
  }

  /** Everything anew, as after a loaded list; rows that are there stay. */
  draw() {
    this.#drawn = true;
    put(this.heading, t("sidebar_title"));
    put(this.now.title, t("sidebar_now"));
    put(this.earlier.title, t("sidebar_earlier"));
    for (const [id, row] of this.rows) if (!this.jobs.known.has(id)) this.#drop(id, row);
    for (const job of this.jobs.known.values()) this.#row(job);
    this.#tidy();
  }

  update(job) {
    if (!this.#drawn) return;
    this.#row(job);
    this.#tidy();
  }

  #row(job) {
    let row = this.rows.get(job.id);
    if (!row) {
      row = new JobRow(job, this.jobs.actions);
      row.element.lora2Row = row;
      this.rows.set(job.id, row);
      this.watch.observe(row.element);
    } else {
      row.update(job);
    }
    this.#place(row);
  }

  #drop(id, row) {
    this.watch.unobserve(row.element);
    row.element.remove();
    this.rows.delete(id);
  }

  #place(row) {
    const { job, element: item } = row;
    const list = (ACTIVE.has(job.state) ? this.now : this.earlier).list;
    const key = order(job);
    if (item.parentElement === list && row.key === key) return;
    row.key = key;
    const others = [...list.children].filter((other) => other !== item);
    const next = others.find((other) => other.lora2Row.key > key) ?? null;
    if (item.parentElement === list && item.nextElementSibling === next) return;
    const focused = item.contains(document.activeElement) ? document.activeElement : null;
    list.insertBefore(item, next);
    focused?.focus({ preventScroll: true }); // a moved element loses it
  }

  #tidy() {
    this.now.root.hidden = !this.now.list.childElementCount;
    this.earlier.root.hidden = !this.earlier.list.childElementCount;
    const { error, loaded, checkpoints } = this.jobs;
    this.leftovers.draw(checkpoints);
    const kind = error ? "error" : loaded && !this.rows.size ? "empty" : "";
    if (kind === this.note.dataset.kind && kind !== "error") return;
    this.note.dataset.kind = kind;
    this.note.hidden = !kind;
    if (kind === "error") this.note.replaceChildren(...this.#errorNote(error));
    if (kind === "empty") this.note.replaceChildren(...this.#emptyNote());
  }

  #emptyNote() {
    const browse = make("button", "lora2-side-button", { type: "button" });
    browse.textContent = t("sidebar_templates");
    browse.onclick = () => this.jobs.app.extensionManager.command.execute("Comfy.BrowseTemplates");
    return [
      icon("pi-chart-line"),
      make("strong", "", { textContent: t("sidebar_empty") }),
      make("p", "", { textContent: t("sidebar_empty_hint") }),
      browse,
    ];
  }

  #errorNote(error) {
    const retry = make("button", "lora2-side-button", { type: "button" });
    retry.textContent = t("sidebar_retry");
    retry.onclick = () => this.jobs.load();
    const text = make("p", "", { textContent: t("unknown_error", { error: error.message }) });
    text.setAttribute("role", "alert");
    return [icon("pi-exclamation-triangle"), text, retry];
  }
}

/** What a card shows beyond the list: the words that call the LoRA, and pictures to try in turn. */
async function look(job) {
  const [file, detail] = await Promise.allSettled([
    api.inspect(job.file),
    job.samples ? api.job(job.id) : null,
  ]);
  const gone = file.status === "rejected" && file.reason.status === 404;
  const told = file.value ?? {};
  const newest = detail.value?.samples?.at(-1)?.urls ?? [];
  const pictures = [...newest.slice(0, 1), told.thumbnail].filter(Boolean).map(api.pictureUrl);
  if (job.state === "finished") pictures.push(api.reportUrl(job.id));
  return { gone, trigger: told.trigger ?? "", rank: told.mean_rank, size: told.bytes, pictures };
}

/** `work`, at most `most` at the same time; the rest waits. */
function limited(work, most) {
  const waiting = [];
  let running = 0;
  const next = () => {
    if (running >= most || !waiting.length) return;
    running += 1;
    waiting.shift()();
  };
  return async (...values) => {
    const turn = new Promise((go) => waiting.push(go));
    next();
    await turn;
    try {
      return await work(...values);
    } finally {
      running -= 1;
      next();
    }
  };
}

/** Who is at work comes first, then the queue as it will be served; the rest newest first. */
function order(job) {
  if (job.state === "queued") return 1 + (job.position ?? 1e6);
  return ACTIVE.has(job.state) ? 0 : -job.created;
}

function rank(job) {
  return job.mean_rank == null ? "–" : number(job.mean_rank, 1);
}

function section() {
  const root = make("section", "", { hidden: true });
  const title = root.appendChild(make("h3"));
  const list = root.appendChild(make("ul"));
  list.setAttribute("role", "list"); // which some screen readers forget for one without bullets
  return { root, title, list };
}
