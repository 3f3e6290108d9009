// The settings beside the conversation; an empty field leaves the choice to the server.

import { $ } from "./dom.js";

const KEY = "mllm-audio-api-key"; // in sessionStorage: it is gone with the tab

const numberOf = (id) => ($(id).value === "" ? null : Number($(id).value));

/** Return the API key as it is typed. */
export const apiKey = () => $("key").value.trim();

/** Fill the fields with what the server takes where a request says nothing. */
export function fillIn({ defaults, max_seconds: maxSeconds }) {
  const { guidance_scale: scale, guidance_weight: weight } = defaults;
  const values = {
    guidance: weight === null || weight === undefined ? scale : 1 + weight,
    steps: defaults.num_inference_steps,
    temperature: 1,
    seconds: defaults.seconds ?? "",
  };
  for (const [id, value] of Object.entries(values)) {
    $(id).value = $(id).defaultValue = value;
  }
  $("seconds").max = maxSeconds;
}

/** Return the first field that holds what it must not, null if there is none. */
export function firstInvalid() {
  return [...$("settings").querySelectorAll("input")].find((input) => !input.checkValidity()) ?? null;
}

/** Return what is asked for: seed, temperature of the text, and `mllm_audio` for the sound. */
export function chosen() {
  const sound = {};
  const fields = { guidance_scale: "guidance", num_inference_steps: "steps", seconds: "seconds" };
  for (const [name, id] of Object.entries(fields))
    if (numberOf(id) !== null && $(id).value !== $(id).defaultValue) sound[name] = numberOf(id);
  return {
    seed: numberOf("seed") ?? randomSeed(),
    temperature: numberOf("temperature"),
    seconds: numberOf("seconds"),
    sound,
  };
}

function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] >>> 1; // 31 bits: any program reads them
}

/** Connect the fields; `onKey` is called when another API key has been typed. */
export function connect(onKey) {
  $("key").value = sessionStorage.getItem(KEY) ?? "";
  $("key").addEventListener("change", () => {
    sessionStorage.setItem(KEY, apiKey());
    onKey();
  });
  $("dice").addEventListener("click", () => { $("seed").value = randomSeed(); });
  $("reset").addEventListener("click", () => {
    for (const id of ["seed", "guidance", "steps", "temperature", "seconds"]) $(id).value = $(id).defaultValue;
  });
  const wide = matchMedia("(min-width: 60rem)");
  const unfold = () => { $("settings").open = wide.matches; };
  wide.addEventListener("change", unfold);
  unfold();
}

/** Open the settings at a field. */
export function open(id) {
  $("settings").open = true;
  $(id).focus();
}
