// A person's way to the API of this server. Nothing is kept: key and conversations live in this tab.

const at = (id) => document.getElementById(id);
let models = [];
let conversations = new Map(); // by model: messages so far
let running = null; // AbortController of the answers that are being written

function say(text, problem = false) {
  at("status").textContent = text;
  at("status").classList.toggle("problem", problem);
}

async function ask(path, body, signal) {
  const key = at("key").value.trim();
  if (!/^[!-~]*$/.test(key)) throw new Error("a key has no blanks or letters beyond ASCII in it");
  const headers = { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
  const request = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  const response = await fetch(path, request).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("the server cannot be reached");
  });
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new Error(told?.error?.message ?? `the server answered ${response.status}`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (!data || data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

const chosen = () => [...new Set([at("model").value, at("beside").value])].filter(Boolean);
const described = (name) => models.find((model) => model.id === name);
const classifies = (name) => described(name).kind === "classification";
const column = (name) => at(`answers-${name}`);

function arrange() {
  const writers = chosen().filter((name) => !classifies(name));
  for (const node of document.querySelectorAll(".writes")) node.hidden = !writers.length;
  const chat = writers.every((name) => described(name).chat);
  at("mode").options[0].disabled = !chat;
  if (!chat) at("mode").value = "completion";
  clear();
}

function clear() {
  conversations = new Map();
  at("columns").replaceChildren(...chosen().map((name) =>
    element("article", { id: `answers-${name}`, ariaLive: "polite" }, element("h2", { textContent: name }))));
}

// The end of a column stays in sight unless the person has scrolled away from it.
function follow(place, change) {
  const seen = place.scrollHeight - place.scrollTop - place.clientHeight < 2;
  change();
  if (seen) place.scrollTop = place.scrollHeight;
}

async function connect() {
  if (running) return;
  say("Connecting …");
  try {
    models = (await (await ask("v1/models")).json()).data;
  } catch (error) {
    return say(error.message, true);
  }
  if (!models.length) return say("There is no model here.", true);
  const options = () => models.map((model) => element("option", { value: model.id, textContent: model.id }));
  at("model").replaceChildren(...options());
  at("beside").replaceChildren(element("option", { value: "", textContent: "(nothing)" }), ...options());
  const second = models.find((model) => model.id !== models[0].id && model.kind === models[0].kind);
  at("beside").value = second?.id ?? "";
  at("mode").value = models[0].chat ? "chat" : "completion";
  at("main").hidden = false;
  arrange();
  say(`${models.length} model${models.length === 1 ? "" : "s"} here.`);
  at("text").focus();
}

const turn = (role, text = "") => element("div", { className: `turn ${role}`, textContent: text });
const note = (text, problem = "") => element("p", { className: `facts ${problem}`, textContent: text });

async function write(name, text, signal) {
  const chat = at("mode").value === "chat";
  const messages = [...(conversations.get(name) ?? []), { role: "user", content: text }];
  const body = {
    model: name,
    stream: true,
    stream_options: { include_usage: true },
    temperature: at("temperature").valueAsNumber,
    max_tokens: at("tokens").valueAsNumber, // left empty: null, which the server has a default for
    ...(chat ? { messages } : { prompt: text }),
  };
  const place = column(name);
  const answer = turn("assistant");
  place.append(answer);
  const began = performance.now();
  let finish = "";
  try {
    for await (const event of events(await ask(chat ? "v1/chat/completions" : "v1/completions", body, signal))) {
      const choice = event.choices[0];
      follow(place, () => answer.append((chat ? choice?.delta.content : choice?.text) ?? ""));
      finish = choice?.finish_reason ?? finish;
      if (!event.usage) continue;
      const seconds = (performance.now() - began) / 1000;
      const cut = finish === "length" ? "; cut off there" : "";
      follow(place, () => place.append(note(`Tokens: ${event.usage.completion_tokens} in ${seconds.toFixed(1)} s${cut}`)));
    }
  } finally {
    const said = { role: "assistant", content: answer.textContent };
    // What was written before a stop is seen, and so part of the conversation.
    if (finish || (signal.aborted && said.content)) conversations.set(name, [...messages, said]);
  }
}

async function classify(name, text, signal) {
  const [found] = (await (await ask("v1/classify", { model: name, input: text }, signal)).json()).data;
  const rows = Object.entries(found.probabilities).sort((one, other) => other[1] - one[1]).map(([label, share]) =>
    element("tr", {}, element("th", { scope: "row", textContent: label }), element("td", { textContent: share.toFixed(3) }),
      element("td", {}, element("meter", { value: share, ariaLabel: `probability of ${label}` }))));
  const place = column(name);
  follow(place, () => place.append(element("table", { ariaLabel: "probabilities" }, ...rows)));
}

async function answered(name, text, signal) {
  const place = column(name);
  place.ariaBusy = "true"; // readers of the screen wait for the whole answer
  place.append(turn("user", text));
  place.scrollTop = place.scrollHeight;
  try {
    await (classifies(name) ? classify : write)(name, text, signal);
    return true;
  } catch (error) {
    const stopped = error.name === "AbortError";
    follow(place, () => place.append(stopped ? note("Stopped.") : note(error.message, "problem")));
    return stopped;
  } finally {
    place.ariaBusy = "false";
  }
}

function busy(controller) {
  running = controller;
  for (const id of ["connect", "settings", "send", "clear"]) at(id).disabled = Boolean(running);
  at("stop").disabled = !running;
}

async function send(event) {
  event.preventDefault();
  const text = at("text").value;
  if (!text.trim() || running) return;
  busy(new AbortController());
  say("Writing …");
  at("text").value = "";
  at("text").focus();
  at("columns").scrollIntoView();
  const fine = await Promise.all(chosen().map((name) => answered(name, text, running.signal)));
  busy(null);
  if (fine.every(Boolean)) return say("");
  say(fine.some(Boolean) ? "Not every model answered." : "No answer.", true);
  if (!fine.some(Boolean)) at("text").value ||= text;
}

at("connect").addEventListener("click", connect);
at("key").addEventListener("keydown", (event) => event.key === "Enter" && connect());
for (const id of ["model", "beside", "mode"]) at(id).addEventListener("change", arrange);
at("ask").addEventListener("submit", send);
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
at("stop").addEventListener("click", () => (running?.abort(), at("text").focus()));
at("clear").addEventListener("click", () => (clear(), say("")));
