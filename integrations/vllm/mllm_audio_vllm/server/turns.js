// One exchange on the page: what was asked, what is answered, and how fast.

import { $, announce, element } from "./dom.js";
import { SoundView } from "./plot.js";
import { Sound } from "./sound.js";

export class Turn {
  #parts = new Map(); // index of a part -> its paragraph or its view

  /**
   * @param asked prompt, sounds: Sound[], caption: the prompt is of a sound, not of a conversation.
   * @param model what GET /v1/audio/model says.
   * @param options seed of the answer; seconds asked for, or null; player.
   */
  constructor(asked, model, { seed, seconds, player }) {
    Object.assign(this, { asked, model, seed, seconds, player });
    this.views = [];
    this.sounds = []; // of the answer
    this.sentAt = performance.now();
    this.firstAudio = this.lastAudio = null; // milliseconds after sending
    this.usage = null;
    this.notes = [];
    this.question = element("div", { className: "question" },
      element("h2", { textContent: asked.caption ? "Caption" : "You" }));
    if (asked.prompt) this.question.append(element("p", { className: "text", textContent: asked.prompt }));
    asked.sounds.forEach((sound, i) =>
      this.#show(sound, this.question, `the sound you sent ${i + 1}`, `sent-${i + 1}.wav`));
    this.answer = element("div", { className: "answer" }, element("h2", { textContent: model.model }));
    this.state = element("p", { className: "state" });
    this.root = element("article", {}, this.question, this.answer, this.state);
    this.root.dataset.state = "waiting";
    this.root.setAttribute("aria-busy", "true");
    $("log").append(this.root);
    announce("Waiting for the answer.");
  }

  get text() {
    return [...this.#parts.values()].filter((part) => !(part instanceof SoundView))
      .map((part) => part.textContent).join("");
  }

  #show(sound, parent, name, file, seconds = null) {
    const maxSeconds = this.model.max_seconds;
    const view = new SoundView(sound, this.player, { name, file, seconds, maxSeconds });
    view.onchange = () => this.onchange?.();
    this.views.push(view);
    parent.append(view.root);
    return view;
  }

  addText(index, text) {
    this.root.dataset.state = "arriving";
    if (!this.#parts.has(index)) {
      this.#parts.set(index, element("p", { className: "text" }));
      this.answer.append(this.#parts.get(index));
    }
    this.#parts.get(index).append(text);
  }

  /** Append samples to the sound of a part; return it, and whether it is new. */
  addSamples(index, bytes, last) {
    this.root.dataset.state = "arriving";
    const isNew = !this.#parts.has(index);
    if (isNew) {
      const sound = new Sound(this.model.sample_rate);
      this.sounds.push(sound);
      const number = this.sounds.length;
      const name = this.asked.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "sound";
      this.#parts.set(index, this.#show(sound, this.answer, `sound ${number}`,
        `${name.replace(/^-+|-+$/g, "")}-seed${this.seed}-${number}.wav`, this.seconds));
    }
    const { sound } = this.#parts.get(index);
    if (bytes?.length) {
      this.lastAudio = performance.now() - this.sentAt;
      this.firstAudio ??= this.lastAudio;
      sound.append(bytes);
    }
    if (last) sound.finish();
    return { sound, isNew };
  }

  note(line) {
    this.notes.push(line);
  }

  /** Say what is going on; call it while the answer is on its way. */
  render() {
    for (const view of this.views) view.render();
    if (!this.root.hasAttribute("aria-busy")) return;
    const waited = ((performance.now() - this.sentAt) / 1000).toFixed(1);
    const arrives = this.root.dataset.state === "arriving";
    const doing = arrives ? "Answering" : "Waiting for the server";
    this.state.textContent = `${doing} \u00b7 ${waited} s`;
  }

  /** End the exchange: state is done, stopped or failed; `line` says why, `gaps` how it played. */
  end(state, line, gaps) {
    for (const sound of this.sounds) sound.finish();
    this.root.dataset.state = state;
    this.root.removeAttribute("aria-busy");
    if (line) this.note(line);
    this.state.before(
      ...this.notes.map((text) => element("p", { className: "note", textContent: text })));
    this.state.replaceWith(this.#figures(gaps));
    this.render();
    const seconds = this.sounds.reduce((sum, sound) => sum + sound.seconds, 0);
    const count = this.sounds.length;
    const sounds = count ? ` Sounds: ${count}, ${seconds.toFixed(2)} seconds.` : "";
    announce(state === "done" ? `Answer: ${this.text}${sounds}` : this.notes.join(" "));
  }

  #figures(gaps) {
    const seconds = this.sounds.reduce((sum, sound) => sum + sound.seconds, 0);
    const rows = [];
    if (this.firstAudio !== null) rows.push(["first audio", milliseconds(this.firstAudio),
      "From sending the request to the first samples."]);
    if (seconds > 0) rows.push(["real-time factor", (this.lastAudio / 1000 / seconds).toFixed(2),
      "Seconds from sending the request to its last samples, per second of sound: "
      + "below 1 is faster than real time."]);
    if (this.usage) rows.push(["tokens", tokens(this.usage), "Of the prompt; of the answer's text and sound."]);
    if (gaps?.count) rows.push(["gaps", `${gaps.count}, ${gaps.seconds.toFixed(2)} s in all`,
      "While it played as it came, the next samples were not there in time."]);
    else if (gaps && seconds > 0) rows.push(["gaps", "none", "It played as it came without waiting for samples."]);
    const again = element("button", { type: "button", className: "link", textContent: "use again" });
    again.addEventListener("click", () => { $("seed").value = this.seed; });
    rows.push(["seed", String(this.seed), "The same seed, message and settings give the same answer.", again]);
    return element("dl", {}, ...rows.map(([name, value, title, ...more]) =>
      element("div", { title },
        element("dt", { textContent: name }), element("dd", { textContent: value }, ...more))));
  }
}

function milliseconds(value) {
  return value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(2)} s`;
}

function tokens({ prompt_tokens, completion_tokens, completion_tokens_details: details }) {
  const answer = details
    ? `${details.text_tokens} text + ${details.audio_tokens} audio`
    : `${completion_tokens} answered`;
  return `${prompt_tokens} in, ${answer}`;
}
