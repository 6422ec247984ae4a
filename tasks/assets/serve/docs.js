"use strict";

function element(name, words, kind) {
  const made = document.createElement(name);
  if (words !== undefined) made.textContent = words;
  if (kind) made.className = kind;
  return made;
}

/** A schema in a few words: string, list of string, {label, score} ... */
function words(schema, all) {
  if (!schema) return "";
  if (schema.$ref) return words(all[schema.$ref.split("/").at(-1)], all);
  if (schema.anyOf) return schema.anyOf.map((one) => words(one, all)).join(" or ");
  if (schema.type === "array") return `list of ${words(schema.items, all)}`;
  if (schema.type === "object" && schema.properties) return `{${Object.keys(schema.properties).join(", ")}}`;
  return schema.format === "binary" ? "file" : schema.type ?? "anything";
}

function example(method, path, fields, secured) {
  const parts = Object.entries(fields).map(([name, field]) => {
    const value = { file: "@photo.jpg", classes: "cat,dog", text: "'a red flower'" }[name] ?? field.default;
    return value === undefined || Array.isArray(value) ? "" : ` -F ${name}=${value}`;
  });
  const some = fields.file && fields.text ? parts.filter((part) => !part.includes("file=")) : parts;
  const token = secured ? " -H 'Authorization: Bearer TOKEN'" : "";
  return `curl ${location.origin}${path}${token}${method === "post" ? some.join("") : ""}`;
}

function route(path, method, what, all) {
  const section = element("section");
  const head = element("h2");
  head.append(element("span", method.toUpperCase(), "method"), element("code", path));
  const content = element("div", undefined, "content");
  content.append(element("p", what.description));
  const form = what.requestBody?.content["multipart/form-data"].schema;
  const fields = form?.properties ?? {};
  const rows = [
    ...(what.parameters ?? []).map((one) => [one.name, one.schema, "in the path"]),
    ...Object.entries(fields).map(([name, field]) => [
      name, field, `${form.required?.includes(name) ? "needed" : "may be left out"}. ${field.description ?? ""}`,
    ]),
  ];
  if (rows.length) {
    const table = element("dl");
    for (const [name, schema, note] of rows) table.append(element("dt", name), element("dd", `${words(schema, all)}, ${note}`));
    content.append(element("h3", "Fields"), table);
  }
  content.append(element("pre", example(method, path, fields, what.security)));
  const answers = element("dl");
  for (const [status, one] of Object.entries(what.responses)) {
    const [kind, body] = Object.entries(one.content ?? {})[0] ?? ["", {}];
    if (Number(status) < 300) answers.append(element("dt", `${status} ${kind}`), element("dd", words(body.schema, all)));
  }
  const errors = Object.keys(what.responses).filter((status) => Number(status) >= 400);
  answers.append(element("dt", "Errors"), element("dd", errors.join(", ")));
  content.append(element("h3", "Answers"), answers);
  section.append(head, content);
  return section;
}

async function start() {
  const main = document.getElementById("routes");
  try {
    const document_ = await (await fetch("/openapi.json")).json();
    const all = document_.components?.schemas ?? {};
    for (const [path, methods] of Object.entries(document_.paths)) {
      for (const [method, what] of Object.entries(methods)) main.append(route(path, method, what, all));
    }
  } catch {
    main.append(element("p", "The OpenAPI document cannot be read; is the service running?", "error"));
  }
  main.setAttribute("aria-busy", "false");
}

start();
