// The page of the server: sends messages and captions, shows and plays what comes back.

import { Composer } from "./composer.js";
import { $, announce } from "./dom.js";
import { drawKey } from "./plot.js";
import { Player } from "./player.js";
import { apiKey, chosen, connect, fillIn, firstInvalid, open } from "./settings.js";
import { toBytes } from "./sound.js";
import { Turn } from "./turns.js";
import { events, pieces, request, ServerError } from "./wire.js";

const RETRY = 2000; // milliseconds, while the server starts

const player = new Player();
const composer = new Composer(report);
let model = null; // what GET /v1/audio/model says
let messages = []; // of the conversation, as requests carry them
let turns = [];
let running = null; // AbortController of the request that is being answered
let ticking = false;

function report(line) {
  $("problem").textContent = line;
  $("problem").hidden = !line;
}

const isCaption = () => $("mode-caption").checked;

async function loadModel() {
  try {
    model = await (await request("/v1/audio/model", { key: apiKey() })).json();
  } catch (error) {
    model = null;
    report(failureLine(error));
    if (error.status === 401) open("key");
    else setTimeout(loadModel, RETRY);
    return;
  } finally {
    $("send").disabled = model === null;
  }
  report("");
  composer.model = model;
  document.title = `${model.model} \u00b7 mllm-audio`;
  $("model").textContent = model.model;
  const longest = Number(model.max_seconds.toFixed(2));
  $("facts").textContent = `${model.sample_rate / 1000} kHz \u00b7 sounds up to ${longest} s`;
  fillIn(model);
  $("mode-chat").disabled = !model.chats;
  if (!model.chats) $("mode-caption").checked = true;
  showMode();
}

function showMode() {
  const caption = isCaption();
  $("extras").hidden = caption;
  $("text-settings").hidden = caption;
  $("prompt").placeholder = caption ? "What should it sound like?" : "Write a message";
}

function newConversation() {
  running?.abort();
  player.pause();
  messages = [];
  turns = [];
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  report("");
  announce("New conversation.");
  $("prompt").focus();
}

/** Do what makes the page longer; who was at its end stays there. */
function staying(action) {
  const { scrollHeight } = document.documentElement;
  const atEnd = innerHeight + scrollY >= scrollHeight - 80;
  action();
  const grown = document.documentElement.scrollHeight;
  if (atEnd && grown > scrollHeight) scrollTo(0, grown);
}

function tick() {
  player.pump();
  staying(() => { for (const turn of turns) turn.render(); });
  ticking = running !== null || player.active;
  if (ticking) requestAnimationFrame(tick);
}

function wake() {
  if (!ticking) requestAnimationFrame(tick);
  ticking = true;
}

function showRunning() {
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
}

async function send() {
  const invalid = firstInvalid();
  if (invalid) {
    open(invalid.id);
    return void invalid.reportValidity();
  }
  const prompt = $("prompt").value.trim();
  const caption = isCaption();
  if (running || !model || !(prompt || (!caption && composer.attached.length))) return;
  const asked = { prompt, caption, sounds: caption ? [] : composer.take() };
  const choice = chosen();
  report("");
  $("empty").hidden = true;
  $("prompt").value = "";
  grow();
  player.pause();
  player.reset();
  player.unlock(model.sample_rate);
  const turn = new Turn(asked, model, { ...choice, player });
  turn.onchange = wake;
  turns.push(turn);
  turn.root.scrollIntoView({ block: "end" });
  await run(turn, choice);
}

async function run(turn, choice) {
  const abort = (running = new AbortController());
  showRunning();
  wake();
  const gaps = $("live").checked ? player.gaps : null;
  try {
    await (turn.asked.caption ? speak : chat)(turn, choice, abort.signal);
    staying(() => turn.end("done", "", gaps));
  } catch (error) {
    if (error.name === "AbortError") {
      player.pause();
      staying(() => turn.end("stopped", stoppedLine(turn), gaps));
    } else fail(turn, error, gaps);
  } finally {
    if (running === abort) running = null;
    showRunning();
    player.pump();
    wake();
  }
}

function stoppedLine(turn) {
  return turn.asked.caption ? "Stopped." : "Stopped. This exchange is not part of what the model sees next.";
}

function fail(turn, error, gaps) {
  const came = turn.text || turn.sounds.length;
  staying(() => turn.end("failed", failureLine(error), gaps));
  if (!(error instanceof ServerError)) console.error(error);
  if (came || $("prompt").value) return;
  $("prompt").value = turn.asked.prompt; // nothing is lost: it can be sent again
  composer.restore(turn.asked.sounds);
  grow();
}

function failureLine(error) {
  if (error.status === 401) return `${error.message}: type the API key of this server in the settings.`;
  if (error.status === 404 && error.param?.endsWith("audio.id"))
    return "The server no longer keeps the sound of an earlier answer; begin a new conversation to go on.";
  return error.message;
}

/** Answer a caption with one sound. */
async function speak(turn, choice, signal) {
  const body = { model: model.model, input: turn.asked.prompt, voice: "default", response_format: "pcm",
    seed: choice.seed, mllm_audio: choice.sound };
  const response = await request("/v1/audio/speech", { key: apiKey(), body, signal });
  for await (const piece of pieces(response)) hear(turn, 0, piece, false);
  if (!turn.sounds.length) throw new ServerError("The server sent no sound.");
  hear(turn, 0, null, true);
}

/** Answer a message in text and sound; the exchange then belongs to the conversation. */
async function chat(turn, choice, signal) {
  const message = { role: "user", content: contentOf(turn.asked) };
  const body = { model: model.model, messages: [...messages, message], modalities: ["text", "audio"],
    audio: { voice: "default", format: "pcm16" }, stream: true, stream_options: { include_usage: true },
    seed: choice.seed, mllm_audio: choice.sound };
  if (choice.temperature !== null) body.temperature = choice.temperature;
  const response = await request("/v1/chat/completions", { key: apiKey(), body, signal });
  let id = null;
  for await (const event of events(response)) {
    if (event.usage) turn.usage = event.usage;
    const [first] = event.choices;
    if (!first) continue;
    id = first.delta.audio?.id ?? id;
    if (first.finish_reason === "length") turn.note("The answer was cut at the longest the server allows.");
    take(turn, first.delta);
  }
  if (!id && !turn.text) throw new ServerError("The answer is empty: the model said nothing.");
  const answer = id ? { role: "assistant", audio: { id } } : { role: "assistant", content: turn.text };
  messages.push(message, answer);
}

function contentOf({ prompt, sounds }) {
  if (!sounds.length) return prompt;
  const parts = sounds.map((sound) =>
    ({ type: "input_audio", input_audio: { data: sound.base64(), format: "wav" } }));
  return prompt ? [{ type: "text", text: prompt }, ...parts] : parts;
}

function take(turn, delta) {
  for (const part of delta.content_parts ?? []) {
    if (part.type === "text") staying(() => turn.addText(part.index, part.text));
    else hear(turn, part.index, delta.audio?.data ? toBytes(delta.audio.data) : null, part.last);
  }
}

function hear(turn, index, bytes, last) {
  let sound, isNew;
  staying(() => { ({ sound, isNew } = turn.addSamples(index, bytes, last)); });
  if (isNew && $("live").checked) player.follow(sound);
  else player.pump();
}

/** Make the box as high as its text, within bounds that the style sheet sets. */
function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}

function pressed(event) {
  const touch = matchMedia("(hover: none)").matches; // there, Enter is the way to a new line
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch) return;
  event.preventDefault();
  send();
}

connect(loadModel);
drawKey($("colours"));
$("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("prompt").addEventListener("keydown", pressed);
$("prompt").addEventListener("input", grow);
$("stop").addEventListener("click", () => { running?.abort(); $("prompt").focus(); });
$("new").addEventListener("click", newConversation);
for (const id of ["mode-chat", "mode-caption"]) $(id).addEventListener("change", showMode);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const turn of turns) for (const view of turn.views) view.redraw();
});
loadModel();
