// How a group and its samples look. All texts, of which a model wrote most, become text nodes and
// never markup.
"use strict";

// A token's log-prob below 0, or an advantage's size, from which the next colour begins.
const SURPRISES = [0.1, 0.5, 1, 2, 4];
const SIZES = [0.02, 0.5, 1, 2];

const find = (id) => document.getElementById(id);

function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}


const number = (value, digits) =>
  value === null || value === undefined ? "–" : String(Number(value.toFixed(digits)));
const signed = (value) => (value > 0 ? "+" : "") + number(value, 3);

function ofToken(sample, turn, at) {
  const all = sample.advantages;
  return {
    logprob: sample.logprobs ? sample.logprobs[turn][at] : null,
    advantage: all ? all[turn][at] : sample.advantage === undefined ? null : sample.advantage,
  };
}

function colour(values) {
  if (state.colour === "logprob" && values.logprob !== null) {
    return `surprise${SURPRISES.filter((limit) => -values.logprob >= limit).length}`;
  }
  if (state.colour === "advantage" && values.advantage !== null) {
    const size = SIZES.filter((limit) => Math.abs(values.advantage) >= limit).length;
    return size ? `${values.advantage > 0 ? "better" : "worse"}${size}` : "neither";
  }
  return "";
}

function told(text, values) {
  const parts = [JSON.stringify(text)];
  if (values.logprob !== null) {
    parts.push(`log-prob ${number(values.logprob, 4)}`);
    parts.push(`probability ${number(100 * Math.exp(values.logprob), 2)}%`);
  }
  if (values.advantage !== null) parts.push(`advantage ${signed(values.advantage)}`);
  return parts.join(", ");
}

function drawTokens(sample) {
  const text = make("pre", "completion");
  if (!sample.tokens) {
    text.textContent = sample.completion;
    return text;
  }
  sample.tokens.forEach((turn, number) => {
    if (number) text.append(make("span", "seen", (sample.seen || [])[number - 1] || ""));
    turn.forEach((piece, at) => {
      const token = make("span", colour(ofToken(sample, number, at)), piece);
      token.onmouseenter = () => { token.title = told(piece, ofToken(sample, number, at)); };
      text.append(token);
    });
  });
  return text;
}

function drawSample(sample, at) {
  const article = make("article");
  const head = make("header");
  const reward = make("b", "", `reward ${number(sample.reward, 4)}`);
  head.append(make("span", "place", `${at + 1}`), reward);
  if (sample.advantage !== undefined && sample.advantage !== null) {
    head.append(make("span", "", `advantage ${signed(sample.advantage)}`));
  }
  head.append(make("span", `finish ${sample.finish === "length" ? "cut" : ""}`, sample.finish));
  if (sample.tokens) {
    const count = sample.tokens.reduce((sum, turn) => sum + turn.length, 0);
    head.append(make("span", "", count === 1 ? "1 token" : `${count} tokens`));
  }
  article.append(head, drawTokens(sample));
  return article;
}

function drawGroup(found, samples, at) {
  const section = make("section");
  section.id = `group${at}`;
  section.tabIndex = -1;
  const known = found.samples.map((one) => one.reward).filter((one) => one !== null);
  const mean = known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
  const title = make("h2");
  const link = make("a", "", found.id === null ? `group ${at}` : found.id);
  link.href = hash({ ...state, group: at });
  title.append(link, make("span", "", `mean reward ${number(mean, 3)} of ${found.samples.length}`));
  if (found.reference) title.append(make("span", "", `reference ${found.reference}`));
  section.append(title, make("pre", "prompt", found.prompt));
  const row = make("div", "samples");
  samples.forEach((one) => row.append(drawSample(one, found.samples.indexOf(one))));
  section.append(row);
  section.onclick = () => focusOn(at, false);
  return section;
}
