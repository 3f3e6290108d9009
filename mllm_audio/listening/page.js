"use strict";
// The page of a listening test: ask for the next clip, play it, send each answer as it is given.

const $ = (id) => document.getElementById(id);
const QUESTIONS = ["REL", "OVL"];
const NAME = "listening-test-rater"; // what the browser remembers, so that a reload goes on
const audio = new Audio();
let rater = "", clip = null, answers = {}, plays = 0;
let sending = Promise.resolve(); // answers are sent one after the other: the last one given counts

function show(id) {
  for (const section of document.querySelectorAll("section")) section.hidden = section.id !== id;
}

function report(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

async function post(path, values) {
  let response;
  try {
    response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(values),
    });
  } catch {
    throw new Error("The server does not answer. Your last answer may not be stored: try again.");
  }
  const reply = await response.json();
  if (!response.ok) throw new Error(reply.error);
  return reply;
}

async function join(name) {
  const reply = await post("/next", { rater: name });
  rater = reply.rater;
  localStorage.setItem(NAME, rater);
  await present(reply);
}

function leave() {
  audio.pause();
  localStorage.removeItem(NAME);
  report("");
  show("welcome");
  $("name").value = "";
  $("name").focus();
}

async function present(reply) {
  $("total").textContent = reply.total;
  clip = reply.clip;
  if (!clip) return show("thanks");
  $("rater").textContent = rater;
  $("count").textContent = `Sound ${reply.done + 1} of ${reply.total}`;
  $("progress").max = reply.total;
  $("progress").value = reply.done;
  $("caption").textContent = clip.caption;
  answers = { ...clip.answers };
  plays = 0;
  render();
  show("rating");
  await load(clip.id);
}

async function load(id) {
  $("play").disabled = true;
  $("position").value = 0;
  const response = await fetch(`/clip/${id}`);
  if (!response.ok) throw new Error((await response.json()).error);
  if (audio.src) URL.revokeObjectURL(audio.src);
  audio.src = URL.createObjectURL(await response.blob());
  $("play").disabled = false;
  $("play").focus();
}

function render() {
  const open = QUESTIONS.find((question) => !answers[question]);
  for (const question of QUESTIONS) {
    $(question).disabled = plays === 0;
    $(question).classList.toggle("current", question === open);
    for (const input of $(question).querySelectorAll("input"))
      input.checked = Number(input.value) === answers[question];
  }
  $("hint").textContent = plays ? "" : "Listen to the end, then rate.";
  $("next").disabled = plays === 0 || Boolean(open);
  $("play").querySelector("span").textContent = audio.paused ? (plays ? "Again" : "Play") : "Pause";
  $("play").querySelector("path").setAttribute(
    "d", audio.paused ? "M7 4.5v15l12.5-7.5z" : "M6 5h4v14H6zM14 5h4v14h-4z");
}

function answer(question, score) {
  const values = { rater, clip: clip.id, question, score, plays };
  const before = answers[question];
  answers[question] = score;
  render();
  sending = sending.then(async () => {
    try {
      await post("/rate", values);
      report("");
    } catch (error) {
      if (clip && clip.id === values.clip) answers[question] = before;
      render();
      report(error.message);
    }
  });
}

async function next() {
  if ($("next").disabled) return;
  $("next").disabled = true;
  await sending;
  if (QUESTIONS.some((question) => !answers[question])) return; // one was not stored
  audio.pause();
  try {
    await present(await post("/next", { rater }));
    report("");
  } catch (error) {
    report(error.message);
    $("next").disabled = false;
  }
}

function toggle() {
  if ($("play").disabled) return;
  if (audio.paused) audio.play().catch((error) => report(`The sound does not play: ${error.message}`));
  else audio.pause();
}

function pressed(event) {
  if ($("rating").hidden || event.ctrlKey || event.altKey || event.metaKey) return;
  const onButton = event.target instanceof HTMLButtonElement;
  if (event.key === " " && !onButton) {
    event.preventDefault();
    if (!event.repeat) toggle();
  } else if (event.key === "Enter" && !event.repeat && (!onButton || event.target === $("play"))) {
    if (!$("next").disabled) {
      event.preventDefault();
      next();
    }
  } else if (/^[1-5]$/.test(event.key) && plays && !event.repeat) {
    const fieldset = event.target.closest("fieldset");
    const question = fieldset?.id ?? QUESTIONS.find((name) => !answers[name]);
    if (question) answer(question, Number(event.key));
    fieldset?.querySelector(`[value="${event.key}"]`).focus(); // where the arrows go on from
  }
}

function track() {
  if (audio.duration) $("position").value = audio.currentTime / audio.duration;
  if (!audio.paused) requestAnimationFrame(track);
}

for (const scale of document.querySelectorAll(".scale")) {
  const question = scale.closest("fieldset").id;
  scale.dataset.words.split("|").forEach((word, index) => {
    const label = scale.appendChild(document.createElement("label"));
    const input = label.appendChild(document.createElement("input"));
    Object.assign(input, { type: "radio", name: question, value: index + 1 });
    label.appendChild(document.createElement("b")).textContent = index + 1;
    label.appendChild(document.createElement("small")).textContent = word;
    input.addEventListener("change", () => answer(question, index + 1));
  });
}
audio.addEventListener("play", () => { render(); track(); });
audio.addEventListener("pause", render);
audio.addEventListener("ended", () => { plays += 1; render(); });
audio.addEventListener("error", () => report("This sound does not play; tell who runs the test."));
$("play").addEventListener("click", toggle);
$("next").addEventListener("click", next);
$("leave").addEventListener("click", leave);
$("other").addEventListener("click", leave);
document.addEventListener("keydown", pressed);
$("join").addEventListener("submit", async (event) => {
  event.preventDefault();
  report("");
  await join($("name").value).catch((error) => report(error.message));
});

const known = localStorage.getItem(NAME);
if (known) join(known).catch((error) => { leave(); report(error.message); });
else show("welcome");
