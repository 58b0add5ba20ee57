// The page of samples: what is shown, loaded and chosen. It works from disk: data is loaded by
// script elements, as a page of a file may not fetch. draw.js makes the elements.
"use strict";

const PAGE = 20; // groups that are added at once
const KEPT = 64; // pieces of data held in memory
const COLOURS = ["logprob", "advantage", "none"];

let index = null;
let entries = []; // {run, name, steps}, in the order of the list
const pieces = new Map(); // key -> groups, the last used at the end
const waiting = new Map(); // key -> [resolve, reject]
const state = {
  run: "", series: "", step: 0, group: 0, colour: "logprob",
  low: "", high: "", finish: "", which: "all", text: "",
};
let drawing = 0; // each drawing of the list makes those before it stop
let next = 0; // number of the first group that has not been looked at
let shown = 0;

// What the data files call.
window.megarlx = {
  index(found) {
    index = found;
    entries = found.series;
  },
  samples(key, groups) {
    pieces.set(key, groups);
  },
};

function load(key) {
  if (pieces.has(key)) {
    const groups = pieces.get(key);
    pieces.delete(key);
    pieces.set(key, groups);
    return Promise.resolve(groups);
  }
  if (!waiting.has(key)) {
    waiting.set(key, new Promise((resolve, reject) => {
      const script = make("script");
      script.src = `data/${key}.js`;
      script.onload = () => {
        script.remove();
        waiting.delete(key);
        if (!pieces.has(key)) return reject(new Error(`data/${key}.js is damaged`));
        for (const old of pieces.keys()) {
          if (pieces.size <= KEPT) break;
          if (old !== key) pieces.delete(old);
        }
        return resolve(pieces.get(key));
      };
      script.onerror = () => {
        script.remove();
        waiting.delete(key);
        reject(new Error(`data/${key}.js cannot be loaded`));
      };
      document.head.append(script);
    }));
  }
  return waiting.get(key);
}

// Where we are.

const entry = () =>
  entries.find((one) => one.run === state.run && one.name === state.series) || entries[0];

function place() {
  const steps = entry().steps;
  let at = 0;
  steps.forEach((one, number) => { if (one.step <= state.step) at = number; });
  return at;
}

const step = () => entry().steps[place()];

async function group(number) {
  const firsts = step().firsts;
  let piece = 0;
  while (piece + 1 < firsts.length && firsts[piece + 1] <= number) piece += 1;
  const key = `${entry().folder}/${step().file}-${String(piece).padStart(4, "0")}`;
  return (await load(key))[number - firsts[piece]];
}

// What is wanted of it.

function wanted(sample) {
  if (state.finish && sample.finish !== state.finish) return false;
  if (state.low !== "" && !(sample.reward !== null && sample.reward >= Number(state.low))) return false;
  if (state.high !== "" && !(sample.reward !== null && sample.reward <= Number(state.high))) return false;
  return true;
}

function chosen(found) {
  const rewards = found.samples.map((one) => one.reward);
  const mixed = rewards.some((one) => one !== rewards[0]);
  if (state.which === "mixed" && !mixed) return [];
  if (state.which === "alike" && mixed) return [];
  const text = state.text.toLowerCase();
  const holds = (one) => one.toLowerCase().includes(text);
  const samples = found.samples.filter(wanted);
  if (!text || holds(found.prompt)) return samples;
  return samples.filter((one) => holds(written(one)) || (one.seen || []).some(holds));
}

function written(sample) {
  return sample.tokens ? sample.tokens.map((turn) => turn.join("")).join("\n") : sample.completion;
}

async function more() {
  const mine = ++drawing;
  const end = step().groups;
  const until = shown + PAGE;
  while (next < end && shown < until) {
    let found;
    try {
      found = await group(next);
    } catch (error) {
      if (mine === drawing) say(error.message);
      return;
    }
    if (mine !== drawing) return;
    const samples = chosen(found);
    if (samples.length) {
      find("groups").append(drawGroup(found, samples, next));
      shown += 1;
      if (next === state.group) mark();
    }
    next += 1;
    if (next % 500 === 0) count();
  }
  count();
}

function count() {
  const now = step();
  const rest = now.groups - next;
  say(
    `${shown} of the ${next - state.group} groups looked at; step ${now.step.toLocaleString("en")} has ` +
      `${now.groups.toLocaleString("en")} groups, ${now.samples.toLocaleString("en")} samples, mean reward ` +
      number(now.reward, 3),
  );
  find("earlier").hidden = state.group === 0;
  find("more").hidden = rest === 0;
  find("none").hidden = shown > 0 || rest > 0;
  document.body.dataset.shown = shown;
}

const say = (text) => { find("count").textContent = text; };

async function draw() {
  state.group = Math.max(0, Math.min(state.group, step().groups - 1));
  next = state.group;
  shown = 0;
  find("groups").replaceChildren();
  tell();
  await more();
}

// Controls, and the address, which leads back to what is shown.

function hash(of) {
  const words = new URLSearchParams();
  for (const [key, value] of Object.entries(of)) {
    if (value !== "" && value !== null) words.set(key, value);
  }
  return `#${words}`;
}

let address = "";

function tell() {
  const steps = entry().steps;
  find("series").value = String(entries.indexOf(entry()));
  find("step").max = steps.length - 1;
  find("step").value = place();
  find("step").disabled = steps.length === 1;
  find("at").textContent = `step ${step().step.toLocaleString("en")}`;
  for (const key of ["low", "high", "finish", "which", "text", "colour"]) find(key).value = state[key];
  for (const legend of document.querySelectorAll(".legend")) {
    legend.hidden = legend.dataset.colour !== state.colour;
  }
  address = hash(state);
  if (location.hash !== address) location.replace(address);
}

function read() {
  const words = new URLSearchParams(location.hash.slice(1));
  for (const key of Object.keys(state)) {
    if (!words.has(key)) continue;
    state[key] = typeof state[key] === "number" ? Number(words.get(key)) || 0 : words.get(key);
  }
  if (!COLOURS.includes(state.colour)) state.colour = COLOURS[0];
  const now = entry();
  state.run = now.run;
  state.series = now.name;
  state.step = step().step;
}

function goTo(at) {
  const steps = entry().steps;
  state.step = steps[Math.max(0, Math.min(at, steps.length - 1))].step;
  return draw();
}

function open(at) {
  const one = entries[Math.max(0, Math.min(at, entries.length - 1))];
  state.run = one.run;
  state.series = one.name;
  state.step = one.steps[one.steps.length - 1].step;
  state.group = 0;
  offerFinishes();
  return draw();
}

function offerFinishes() {
  const all = make("option", "", "any");
  all.value = "";
  const options = entry().finishes.map((one) => {
    const option = make("option", "", one);
    option.value = one;
    return option;
  });
  find("finish").replaceChildren(all, ...options);
  if (!entry().finishes.includes(state.finish)) state.finish = "";
}

function mark() {
  for (const old of document.querySelectorAll("section.here")) old.classList.remove("here");
  const here = find(`group${state.group}`);
  if (here) here.classList.add("here");
  return here;
}

function focusOn(at, scroll) {
  state.group = at;
  tell();
  const here = mark();
  if (here && scroll) here.scrollIntoView({ block: "start" });
}

async function walk(by) {
  const all = [...document.querySelectorAll("main section")];
  const at = all.findIndex((one) => one.classList.contains("here")) + by;
  if (at < 0) return;
  if (at >= all.length) {
    if (next >= step().groups) return;
    await more();
  }
  const one = document.querySelectorAll("main section")[at];
  if (one) focusOn(Number(one.id.slice(5)), true);
}

const KEYS = {
  ArrowLeft: () => goTo(place() - 1),
  ArrowRight: () => goTo(place() + 1),
  j: () => walk(1),
  k: () => walk(-1),
  c: () => {
    state.colour = COLOURS[(COLOURS.indexOf(state.colour) + 1) % COLOURS.length];
    return draw();
  },
  m: () => more(),
  "[": () => open(entries.indexOf(entry()) - 1),
  "]": () => open(entries.indexOf(entry()) + 1),
  "/": () => find("text").focus(),
};

function listen() {
  find("series").onchange = (event) => open(Number(event.target.value));
  find("step").oninput = (event) => goTo(Number(event.target.value));
  find("before").onclick = KEYS.ArrowLeft;
  find("after").onclick = KEYS.ArrowRight;
  find("more").onclick = () => more();
  find("earlier").onclick = () => {
    state.group -= PAGE;
    draw();
  };
  for (const key of ["low", "high", "finish", "which", "text", "colour"]) {
    find(key).oninput = (event) => {
      state[key] = event.target.value;
      state.group = key === "colour" ? state.group : 0;
      draw();
    };
  }
  document.onkeydown = (event) => {
    const at = event.target.tagName;
    const writes = at === "SELECT" || (at === "INPUT" && event.target.type !== "range");
    if (event.key === "Escape") document.activeElement.blur();
    if (writes || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = KEYS[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  };
  window.onhashchange = () => {
    if (location.hash === address) return;
    read();
    offerFinishes();
    draw();
  };
}

function list() {
  const options = entries.map((one, at) => {
    const option = make("option", "", `${one.run}: ${one.name} (${one.kind})`);
    option.value = String(at);
    return option;
  });
  find("series").append(...options);
}

window.onload = () => {
  if (index === null || entries.length === 0) {
    say(index === null ? "data/index.js cannot be loaded" : "There are no samples.");
    return;
  }
  list();
  const last = entries[0].steps;
  state.step = last[last.length - 1].step;
  read();
  offerFinishes();
  listen();
  draw();
};
