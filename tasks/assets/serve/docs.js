"use strict";

function element(name, words, kind) {
  const made = document.createElement(name);
  if (words !== undefined) made.textContent = words;
  if (kind) made.className = kind;
  return made;
}

const known = (schema, all) => schema?.$ref ? all[schema.$ref.split("/").at(-1)] : schema ?? {};

/** A schema in a few words: text, list of texts, {label, score} ... */
function words(reference, all) {
  const schema = known(reference, all);
  if (schema.anyOf) return schema.anyOf.map((one) => words(one, all)).join(" or ");
  if (schema.type === "array") return `list of ${words(schema.items, all)}`;
  if (schema.type === "object" && schema.properties) return `{${Object.keys(schema.properties).join(", ")}}`;
  const named = { string: "text", integer: "whole number", null: "nothing" };
  return schema.format === "binary" ? "file" : named[schema.type] ?? schema.type ?? "anything";
}

/** What a field may be, in a sentence. */
function limits(schema) {
  const parts = [];
  if (schema.minimum !== undefined) parts.push(`from ${schema.minimum.toLocaleString("en")}`);
  if (schema.maximum !== undefined) parts.push(`at most ${schema.maximum.toLocaleString("en")}`);
  if (schema.maxItems !== undefined) parts.push(`at most ${schema.maxItems.toLocaleString("en")} of them`);
  if (schema.maxLength !== undefined) parts.push(`at most ${schema.maxLength.toLocaleString("en")} letters`);
  if (schema.default !== undefined && schema.default !== null && !Array.isArray(schema.default)) parts.push(`by default ${schema.default}`);
  return parts.length ? ` (${parts.join(", ")})` : "";
}

/** The fields of an answer that are described, in it or in its entries. */
function described(reference, all) {
  const schema = known(reference, all);
  if (schema.type === "array") return described(schema.items, all);
  return Object.entries(schema.properties ?? {}).filter(([, one]) => one.description);
}

function terms(pairs) {
  const list = element("dl");
  for (const [term, words_] of pairs) list.append(element("dt", term), element("dd", words_));
  return list;
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
    const told = rows.map(([name, schema, note]) => [name, `${words(schema, all)}${limits(schema)}, ${note}`]);
    content.append(element("h3", "Fields"), terms(told));
  }
  content.append(element("pre", example(method, path, fields, what.security)));
  const answers = [];
  for (const [status, one] of Object.entries(what.responses)) {
    const [kind, body] = Object.entries(one.content ?? {})[0] ?? ["", {}];
    if (Number(status) >= 300) continue;
    answers.push([`${status} ${kind}`, words(body.schema, all)]);
    for (const [name, field] of described(body.schema, all)) answers.push([name, field.description]);
  }
  content.append(element("h3", "Answer"), terms(answers));
  const errors = Object.entries(what.responses).filter(([status]) => Number(status) >= 400);
  const folded = element("details");
  folded.append(element("summary", "Errors"), terms(errors.map(([status, one]) => [status, one.description])));
  content.append(folded);
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
