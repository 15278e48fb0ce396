// Pictures of the report: which contender is shown, the sliders, the contact sheet.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;

document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function pair(picture, name) {
  const other = picture.others[name];
  const slider = element("div", { className: "slider" });
  const range = element("input", {
    type: "range", min: 0, max: 100, value: 50, step: 0.5,
    ariaLabel: `dense to the left, ${name} to the right: ${picture.prompt}`,
  });
  range.addEventListener("input", () => slider.style.setProperty("--at", `${range.value}%`));
  slider.append(
    element("img", { src: picture.dense, alt: `dense: ${picture.prompt}` }),
    element("img", { src: other.picture, alt: `${name}: ${picture.prompt}`, className: "over" }),
    element("div", { className: "handle" }),
    element("span", { className: "tag left" }, "dense"),
    element("span", { className: "tag right" }, name),
    range,
  );
  const difference = element(
    "div", { className: "difference" },
    element("img", { src: other.difference, alt: `difference: ${picture.prompt}` }),
    element("span", { className: "tag left" }, "difference"),
  );
  const caption = element("figcaption", {}, picture.prompt);
  const small = element("div", { className: "soft" });
  small.textContent = [`seed ${picture.seed}`, ...other.values].join(" · ");
  caption.append(small);
  return element(
    "figure", { className: "card pair" },
    element("div", { className: "two" }, slider, difference), caption,
  );
}

const pairs = document.getElementById("pairs");
const choice = document.getElementById("choice");

function show(name) {
  choice.value = name;
  pairs.replaceChildren(
    ...data.pictures.filter((p) => name in p.others).map((p) => pair(p, name)),
  );
}

if (data.pictures.length) {
  choice.append(...data.contenders.map((name) => element("option", { value: name }, name)));
  choice.addEventListener("change", () => show(choice.value));
  show(data.first);

  const head = element("tr", {}, element("th"), element("th", {}, "dense"));
  head.append(...data.contenders.map((name) => element("th", {}, name)));
  const sheet = document.getElementById("sheet");
  sheet.append(head);
  for (const picture of data.pictures) {
    const row = element("tr", {}, element("td", {}, picture.prompt));
    row.append(element("td", {}, element("img", { src: picture.dense, alt: "dense" })));
    for (const name of data.contenders) {
      const cell = element("td");
      if (name in picture.others) {
        const image = element("img", { src: picture.others[name].picture, alt: name });
        image.addEventListener("click", () => {
          show(name);
          pairs.scrollIntoView({ behavior: "smooth", block: "start" });
        });
        cell.append(image);
      }
      row.append(cell);
    }
    sheet.append(row);
  }
}
root.dataset.ready = "true";
