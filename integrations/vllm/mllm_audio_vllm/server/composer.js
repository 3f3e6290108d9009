// What the next message holds besides its text: recordings and files.

import { $, element } from "./dom.js";
import { decode } from "./sound.js";

const MAX_BYTES = 12 * 1024 * 1024; // of a file; the server takes 16 MiB of base64

/** Holds the sounds of the message that is being written. */
export class Composer {
  #recorder = null;

  /** @param report called with a line when something cannot be done, "" when that is over. */
  constructor(report) {
    this.report = report;
    this.model = null;
    this.attached = []; // {name, sound}
    $("record").addEventListener("click", () => this.#guarded(() => this.#toggleRecording()));
    $("attach").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => this.#guarded(() => this.#takeFiles()));
  }

  /** Hand over what is attached, and begin anew. */
  take() {
    const sounds = this.attached.map(({ sound }) => sound);
    this.attached = [];
    this.#render();
    return sounds;
  }

  /** Attach again what a request that failed had taken. */
  restore(sounds) {
    this.attached.push(...sounds.map((sound, i) => ({ name: `sound ${i + 1}`, sound })));
    this.#render();
  }

  async #guarded(action) {
    this.report("");
    try {
      await action();
    } catch (error) {
      this.report(error.message);
    }
  }

  async #takeFiles() {
    const files = [...$("file").files];
    $("file").value = "";
    for (const file of files) {
      if (file.size > MAX_BYTES)
        throw new Error(`${file.name} has ${Math.round(file.size / 2 ** 20)} MiB, expected at most 12.`);
      await this.#attach(file, file.name);
    }
  }

  async #attach(blob, name) {
    let sound;
    try {
      sound = await decode(blob, this.model.sample_rate);
    } catch {
      throw new Error(`${name} is not a sound that this browser can read; choose a WAV or a FLAC file.`);
    }
    this.attached.push({ name, sound });
    this.#render();
  }

  async #toggleRecording() {
    if (this.#recorder) return this.#recorder.stop();
    if (!navigator.mediaDevices)
      throw new Error("Browsers give a microphone only to https pages and to localhost; attach a file instead.");
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    } catch (error) {
      throw new Error(`The microphone cannot be used (${error.message}); allow it, or attach a file.`);
    }
    this.#record(stream);
  }

  #record(stream) {
    const recorder = (this.#recorder = new MediaRecorder(stream));
    const pieces = [];
    const begun = performance.now();
    const timer = setInterval(() => {
      const seconds = (performance.now() - begun) / 1000;
      $("record").textContent = `Stop recording \u00b7 ${seconds.toFixed(1)} s`;
      if (seconds >= this.model.max_seconds) recorder.stop();
    }, 100);
    recorder.addEventListener("dataavailable", ({ data }) => pieces.push(data));
    recorder.addEventListener("stop", () => {
      clearInterval(timer);
      stream.getTracks().forEach((track) => track.stop());
      this.#recorder = null;
      $("record").textContent = "Record";
      $("record").classList.remove("live");
      this.#guarded(() => this.#attach(new Blob(pieces, { type: recorder.mimeType }), "recording"));
    });
    $("record").classList.add("live");
    recorder.start();
  }

  #render() {
    $("attachments").replaceChildren(...this.attached.map((item) => {
      const remove = element("button", { type: "button", textContent: "\u00d7" });
      remove.setAttribute("aria-label", `Remove ${item.name}`);
      remove.addEventListener("click", () => {
        this.attached = this.attached.filter((other) => other !== item);
        this.#render();
      });
      return element("li", {}, `${item.name} \u00b7 ${item.sound.seconds.toFixed(2)} s`, remove);
    }));
  }
}
