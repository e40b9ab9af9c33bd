// The page of `lipnext serve`: sends a picture, shows the label with its radius, and asks for an attack.
"use strict";

const $ = (id) => document.getElementById(id);
const REFERENCES = [["36/255", 36 / 255], ["72/255", 72 / 255], ["108/255", 108 / 255], ["1", 1]];
const PEN = 0.11; // of the drawing's side
const SVG = "http://www.w3.org/2000/svg";

let model = null; // answer of /v1/model
let token = null;
let current = null; // the request that shows what is on the page: {body, type}
let prediction = null;
let latest = 0; // only the answer to the newest request is shown
let previewUrl = null;

// ---- numbers: a radius is never shown larger than it is, a distance never smaller

function down(x) {
  let t = Math.floor(x * 1e4);
  if (t > 0 && t / 1e4 >= x) t -= 1;
  return (t / 1e4).toFixed(4);
}

function up(x) {
  let t = Math.ceil(x * 1e4);
  if (t / 1e4 <= x) t += 1;
  return (t / 1e4).toFixed(4);
}

// ---- requests

async function call(path, request) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (request && request.type) headers["Content-Type"] = request.type;
  let response;
  try {
    response = await fetch(path, request ? { method: "POST", body: request.body, headers } : { headers });
  } catch {
    throw new Error("The server cannot be reached; is it running?");
  }
  const answer = await response.json().catch(() => null);
  if (response.status === 401) {
    $("access").hidden = false;
    $("token").focus();
  }
  if (!response.ok) throw new Error((answer && answer.error) || `The server answered ${response.status}.`);
  return answer;
}

function fail(error) {
  $("problem").textContent = error.message;
  $("problem").hidden = false;
}

function busy(text) {
  $("status").textContent = text;
  $("problem").hidden = true;
}

// ---- the model

async function start() {
  try {
    model = await call("/v1/model");
  } catch (error) {
    fail(error);
    return;
  }
  $("access").hidden = true;
  $("problem").hidden = true;
  const [channels, height, width] = model.input_shape;
  $("facts").textContent =
    `${model.system}, ${model.classes.length} classes, ${width} x ${height} ${channels === 1 ? "grey" : "colour"}; ` +
    `${model.norm}, ${model.kind}, semantics ${model.semantics}, weights ${model.model_sha256.slice(0, 12)}`;
  if (channels === 1) {
    // A whole number of canvas pixels for each of the model's, so that averaging is exact.
    $("canvas").width = width * Math.ceil(280 / width);
    $("canvas").height = height * Math.ceil(280 / height);
    $("drawing").hidden = false;
    clearDrawing();
  }
}

$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  $("token").value = "";
  start();
});

// ---- choosing a picture

function choose(file) {
  if (!file) return;
  const form = new FormData();
  form.append("images", file);
  if (previewUrl) URL.revokeObjectURL(previewUrl);
  previewUrl = URL.createObjectURL(file);
  $("preview").src = previewUrl;
  $("preview").hidden = false;
  predict({ body: form });
}

$("preview").addEventListener("error", () => { $("preview").hidden = true; });
$("file").addEventListener("change", () => choose($("file").files[0]));
$("drop").addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  choose(event.dataTransfer.files[0]);
});

// ---- drawing

const pen = { x: 0, y: 0, isDown: false, drawn: false };

function context() {
  return $("canvas").getContext("2d", { willReadFrequently: true });
}

function clearDrawing() {
  const c = $("canvas");
  context().fillStyle = "#000";
  context().fillRect(0, 0, c.width, c.height);
  Object.assign(pen, { x: c.width / 2, y: c.height / 2, isDown: false, drawn: false });
}

function lineTo(x, y) {
  const c = $("canvas"), draw = context();
  draw.strokeStyle = "#fff";
  draw.lineCap = draw.lineJoin = "round";
  draw.lineWidth = PEN * c.width;
  draw.beginPath();
  draw.moveTo(pen.x, pen.y);
  draw.lineTo(x, y);
  draw.stroke();
  Object.assign(pen, { x, y, drawn: true });
}

function place(event) {
  const c = $("canvas"), box = c.getBoundingClientRect();
  return [((event.clientX - box.left) * c.width) / box.width, ((event.clientY - box.top) * c.height) / box.height];
}

$("canvas").addEventListener("pointerdown", (event) => {
  $("canvas").setPointerCapture(event.pointerId);
  [pen.x, pen.y] = place(event);
  pen.isDown = true;
  lineTo(pen.x, pen.y);
});
$("canvas").addEventListener("pointermove", (event) => { if (pen.isDown && event.buttons) lineTo(...place(event)); });
$("canvas").addEventListener("pointerup", () => { pen.isDown = false; });
$("canvas").addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const c = $("canvas"), step = c.width / 20;
  if (event.key === " ") {
    pen.isDown = !pen.isDown;
    if (pen.isDown) lineTo(pen.x, pen.y);
    $("status").textContent = pen.isDown ? "Pen down." : "Pen lifted.";
  } else if (moves[event.key]) {
    const [dx, dy] = moves[event.key];
    const x = Math.min(Math.max(pen.x + dx * step, 0), c.width), y = Math.min(Math.max(pen.y + dy * step, 0), c.height);
    if (pen.isDown) lineTo(x, y);
    else Object.assign(pen, { x, y });
  } else {
    return;
  }
  event.preventDefault();
});

// The mean over each of the model's pixels, to whole grey levels.
function drawnImage() {
  const [, height, width] = model.input_shape, c = $("canvas");
  const data = context().getImageData(0, 0, c.width, c.height).data;
  const sx = c.width / width, sy = c.height / height;
  const rows = [];
  for (let i = 0; i < height; i++) {
    const row = [];
    for (let j = 0; j < width; j++) {
      let sum = 0;
      for (let y = i * sy; y < (i + 1) * sy; y++)
        for (let x = j * sx; x < (j + 1) * sx; x++) sum += data[4 * (y * c.width + x)];
      row.push(Math.round(sum / (sx * sy)) / 255);
    }
    rows.push(row);
  }
  return rows;
}

$("clear").addEventListener("click", clearDrawing);
$("classify").addEventListener("click", () => {
  if (!pen.drawn) {
    fail(new Error("Nothing is drawn yet."));
    return;
  }
  $("preview").hidden = true;
  $("file").value = "";
  predict({ body: JSON.stringify({ images: [drawnImage()] }), type: "application/json" });
});

// ---- the answer

async function predict(request) {
  const mine = ++latest;
  busy("Certifying ...");
  $("answer").hidden = $("attack").hidden = true;
  try {
    const answer = await call("/v1/predict", request);
    if (mine !== latest) return;
    current = request;
    prediction = answer.predictions[0];
    show(answer);
  } catch (error) {
    if (mine !== latest) return;
    $("status").textContent = "No answer.";
    fail(error);
  }
}

function show(answer) {
  const p = prediction;
  const told = p.abstained ? "No label: not certified well enough" : p.class_name;
  $("label").textContent = told;
  $("radius").textContent = p.radius > 0 ? `certified radius ${down(p.radius)} (${answer.norm})` : "no certified radius";
  $("rival").textContent = p.rival_name === null ? "" : `Nearest rival: ${p.rival_name}.`;
  $("notes").textContent = p.preprocessing === "none" ? "" : `The picture was ${p.preprocessing}.`;
  $("notes").hidden = p.preprocessing === "none";
  $("statement").textContent = answer.statement[0].toUpperCase() + answer.statement.slice(1) + ".";
  const meaning = {
    norm: `${answer.norm}, all pixels and channels together, in [0, 1]`,
    kind: answer.kind === "deterministic" ? "deterministic" : `probabilistic, confidence ${answer.confidence}`,
    semantics: answer.semantics === "real" ? "real" : `deployed, ${answer.arithmetic}`,
    score: `${p.score.toPrecision(5)} (margin of the logits, no probability)`,
    "certified at": Object.entries(p.certified_at).map(([eps, yes]) => `${eps}: ${yes ? "yes" : "no"}`).join(", "),
    weights: answer.model_sha256,
  };
  $("meaning").replaceChildren(...Object.entries(meaning).flatMap(([name, value]) => [text("dt", name), text("dd", value)]));
  bar(p.radius, null);
  $("answer").hidden = false;
  $("status").textContent = `Answer: ${told}, ${$("radius").textContent}.`;
}

function text(tag, content, className) {
  const element = document.createElement(tag);
  element.textContent = content;
  if (className) element.className = className;
  return element;
}

function bar(radius, distance) {
  const right = 1.15 * Math.max(1, radius, distance || 0), x = (value) => 8 + (384 * value) / right;
  const parts = [];
  const put = (tag, attributes, content) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (content !== undefined) element.textContent = content;
    parts.push(element);
  };
  put("rect", { class: "track", x: x(0), y: 34, width: x(right) - x(0), height: 16, rx: 3 });
  put("rect", { class: "proof", x: x(0), y: 34, width: x(radius) - x(0), height: 16, rx: 3 });
  let row = 0;
  for (const [name, value] of REFERENCES) {
    row = x(value) - x(value - 36 / 255) < 44 ? 1 - row : 0; // two rows where the names would touch
    put("line", { class: "tick", x1: x(value), x2: x(value), y1: 34, y2: 56 + 14 * row });
    put("text", { x: x(value), y: 68 + 14 * row, "text-anchor": "middle" }, name);
  }
  put("text", { class: "proof-text", x: x(radius), y: 27, "text-anchor": x(radius) > 100 ? "end" : "start" }, `proved ${down(radius)}`);
  if (distance !== null) {
    put("line", { class: "flip", x1: x(distance), x2: x(distance), y1: 15, y2: 54 });
    put("text", { class: "flip-text", x: x(distance), y: 11, "text-anchor": x(distance) > 200 ? "end" : "start" }, `flipped at ${up(distance)}`);
  }
  $("bar").replaceChildren(...parts);
  $("bar").setAttribute(
    "aria-label",
    `Certified radius ${down(radius)} on a scale with the references 36/255, 72/255, 108/255 and 1` +
      (distance === null ? "" : `; an attack changed the label at ${up(distance)}`),
  );
}

// ---- the attack

$("break").addEventListener("click", async () => {
  const mine = ++latest;
  $("break").disabled = true;
  busy("Attacking, this takes some seconds ...");
  try {
    const found = await call("/v1/attack", current);
    if (mine !== latest) return;
    showAttack(found);
  } catch (error) {
    if (mine !== latest) return;
    $("status").textContent = "No answer to the attack.";
    fail(error);
  } finally {
    $("break").disabled = false;
  }
});

function showAttack(found) {
  const radius = found.prediction.radius, distance = found.distance;
  let verdict = "The attack did not change the label.";
  if (distance !== null) {
    const times = radius > 0 ? `, ${(distance / radius).toFixed(2)} times the certified radius` : "";
    verdict = `The label first flips at ${up(distance)}${times}: it becomes ${found.becomes_name}.`;
  }
  if (found.refuted) verdict = `REFUTED: ${verdict} That is inside the certified radius; please report it.`;
  if (!found.finished) verdict += " The attack ran out of time.";
  $("verdict").textContent = verdict;
  paint($("original"), found.original);
  $("original").setAttribute("aria-label", "The original picture");
  for (const id of ["changed", "difference"]) $(id).parentElement.hidden = found.changed === null;
  if (found.changed !== null) {
    paint($("changed"), found.changed);
    $("changed").setAttribute("aria-label", `The changed picture, labelled ${found.becomes_name}`);
    $("changed-caption").textContent = `changed by ${up(distance)}: ${found.becomes_name}`;
    paint($("difference"), stretched(found.original, found.changed));
  }
  $("budgets").replaceChildren(
    ...found.budgets.map(({ eps, flipped }) => {
      const row = document.createElement("tr");
      const held = eps <= radius ? "held, as proved" : "held";
      row.append(
        text("td", eps.toFixed(4)),
        text("td", radius > 0 ? (eps / radius).toFixed(2) : "-"),
        text("td", flipped ? "label changed" : held, flipped ? "flipped" : "held"),
      );
      return row;
    }),
  );
  bar(radius, distance);
  $("attack").hidden = false;
  $("status").textContent = "The attack has ended.";
  $("verdict").focus();
}

function paint(canvas, image) {
  const height = image[0].length, width = image[0][0].length;
  canvas.width = width;
  canvas.height = height;
  const draw = canvas.getContext("2d"), pixels = draw.createImageData(width, height);
  for (let i = 0; i < height; i++)
    for (let j = 0; j < width; j++) {
      const k = 4 * (i * width + j);
      for (let c = 0; c < 3; c++) pixels.data[k + c] = Math.round(255 * image[c % image.length][i][j]);
      pixels.data[k + 3] = 255;
    }
  draw.putImageData(pixels, 0, 0);
}

// Grey is no change; the largest change of a pixel is black or white.
function stretched(original, changed) {
  const difference = changed.map((plane, c) => plane.map((row, i) => row.map((v, j) => v - original[c][i][j])));
  const largest = Math.max(1e-12, ...difference.flat(2).map(Math.abs));
  return difference.map((plane) => plane.map((row) => row.map((d) => 0.5 + d / (2 * largest))));
}

start();
