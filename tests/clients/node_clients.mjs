// What JavaScript's clients get of the proxy: node node_clients.mjs CLIENT PROXY SAY, run by table.py. As
// python_clients.py: one JSON line a feature.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenAI } from "@ai-sdk/openai";
import * as ai from "ai";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [client, url, sayUrl] = process.argv.slice(2);
const question = [{ role: "user", content: "how is Rome?" }];
const call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>';
const ada = '{"name": "Ada", "age": 36}';
const dot =
  "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
const long = "word ".repeat(8000);
const person = z.object({ name: z.string(), age: z.number() });

async function say(words) {
  await fetch(sayUrl, { method: "POST", body: JSON.stringify(words), headers: { "content-type": "application/json" } });
}

function same(found, wanted) {
  if (JSON.stringify(found) !== JSON.stringify(wanted))
    throw new Error(`${JSON.stringify(found)}, not ${JSON.stringify(wanted)}`);
}

async function refused(ask) {
  const found = await ask();
  throw new Error(`was answered: ${JSON.stringify(found)}`.slice(0, 100));
}

function judged(error) {
  const name = error.constructor.name;
  for (let at = error; at; at = at.cause ?? at.lastError) {
    const status = at.status ?? at.statusCode;
    if (status === 400) return ["refused", `${name}: ${at.error?.message ?? at.message}`];
  }
  return ["failed", `${name}: ${error.message}`.slice(0, 300)];
}

async function run(features) {
  for (const [feature, does] of Object.entries(features)) {
    let outcome = "none", why = does;
    if (typeof does !== "string") {
      await say(does[0]);
      try {
        const found = await does[1]();
        [outcome, why] = ["works", typeof found === "string" ? found : ""];
      } catch (error) {
        [outcome, why] = judged(error);
      }
    }
    console.log(JSON.stringify({ client, feature, outcome, why }));
  }
}

function openaiNode() {
  const api = new OpenAI({ baseURL: url, apiKey: "unused", maxRetries: 0 });
  const ask = { model: "m", messages: question };
  const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
  const tools = [{ type: "function", function: { name: "weather", description: "of a city", parameters } }];
  const create = (more) => api.chat.completions.create({ ...ask, ...more });
  const text = async (more) => (await create(more)).choices[0].message.content;
  const whole = async (more) => {
    const chunks = [];
    for await (const chunk of await create({ stream: true, ...more })) chunks.push(chunk);
    return chunks;
  };
  const image = { type: "image_url", image_url: { url: dot } };
  return {
    chat: ["fine", async () => same(await text(), "fine")],
    stream: ["fine", async () => same((await whole()).map((c) => c.choices[0].delta.content ?? "").join(""), "fine")],
    "usage of a stream": ["fine", async () =>
      same((await whole({ stream_options: { include_usage: true } })).at(-1).usage.completion_tokens > 0, true)],
    "tool loop": [call, async () => {
      const first = (await create({ tools })).choices[0].message;
      same(JSON.parse(first.tool_calls[0].function.arguments), { city: "Rome" });
      await say("Sunny.");
      const result = { role: "tool", tool_call_id: first.tool_calls[0].id, content: '"sun"\n' };
      same(await text({ messages: [...question, first, result], tools }), "Sunny.");
    }],
    "streamed call": [call, async () => {
      const message = await api.chat.completions.stream({ ...ask, tools }).finalMessage();
      same(JSON.parse(message.tool_calls[0].function.arguments), { city: "Rome" });
    }],
    "forced call": [["hm", call], async () =>
      same((await create({ tools, tool_choice: "required" })).choices[0].message.tool_calls.length, 1)],
    "JSON object": ['{"a": 1}', async () => same(await text({ response_format: { type: "json_object" } }), '{"a": 1}')],
    schema: [["hm", ada], async () => {
      const found = await api.chat.completions.parse({ ...ask, response_format: zodResponseFormat(person, "person") });
      same(found.choices[0].message.parsed.age, 36);
    }],
    thoughts: ["<think>hm</think>fine", async () => {
      const message = (await create()).choices[0].message;
      same([message.content, message.reasoning_content], ["fine", "hm"]);
    }],
    "roles and parts": ["fine", async () => same(await text({ messages: [
      { role: "developer", content: "be brief" }, { role: "user", content: [{ type: "text", text: "how is Rome?" }] },
    ] }), "fine")],
    "several answers": ["fine", async () => same((await create({ n: 3 })).choices.length, 3)],
    stop: ["fine STOP more", async () => same(await text({ stop: ["STOP"] }), "fine ")],
    "/v1/completions": ["fine", async () =>
      same((await api.completions.create({ model: "m", prompt: "a" })).choices[0].text, "fine")],
    "/v1/responses": ["fine", async () => {
      same((await api.responses.create({ model: "m", input: "how is Rome?", store: false })).output_text, "fine");
      const last = await api.responses.stream({ model: "m", input: "how is Rome?", store: false }).finalResponse();
      same(last.status, "completed");
    }],
    "list of models": ["", async () => same((await api.models.list()).data.map((m) => m.id), ["m"])],
    "too long a prompt": ["fine", async () => {
      try {
        await text({ messages: [{ role: "user", content: long }] });
      } catch (error) {
        same(error.code, "context_length_exceeded");
        return `${error.constructor.name}, code context_length_exceeded`;
      }
      throw new Error("was answered");
    }],
    embeddings: ["", () => refused(() => api.embeddings.create({ model: "m", input: "a" }))],
    image: ["", () => refused(() => text({ messages: [{ role: "user", content: [image] }] }))],
  };
}

function vercel() {
  const provider = createOpenAICompatible({
    name: "proxy", baseURL: url, apiKey: "unused", includeUsage: true, supportsStructuredOutputs: true,
  });
  const plain = createOpenAICompatible({ name: "proxy", baseURL: url, apiKey: "unused" });
  const responses = createOpenAI({ baseURL: url, apiKey: "unused" });
  const ask = { model: provider("m"), messages: question, maxRetries: 0 };
  const weather = ai.tool({
    description: "of a city", inputSchema: z.object({ city: z.string() }), execute: async ({ city }) => `"sun" in\n${city}`,
  });
  const tools = { weather };
  return {
    chat: ["fine", async () => same((await ai.generateText(ask)).text, "fine")],
    stream: ["fine", async () => same(await ai.streamText(ask).text, "fine")],
    "usage of a stream": ["fine", async () => same((await ai.streamText(ask).usage).outputTokens > 0, true)],
    "tool loop": [[call, "Sunny."], async () => {
      const found = await ai.generateText({ ...ask, tools, stopWhen: ai.stepCountIs(3) });
      same([found.text, found.steps.length], ["Sunny.", 2]);
    }],
    "streamed call": [[call, "Sunny."], async () =>
      same(await ai.streamText({ ...ask, tools, stopWhen: ai.stepCountIs(3) }).text, "Sunny.")],
    "forced call": [["hm", call], async () =>
      same((await ai.generateText({ ...ask, tools, toolChoice: "required" })).toolCalls.length, 1)],
    "JSON object": [ada, async () =>
      same((await ai.generateObject({ ...ask, model: plain("m"), schema: person })).object.age, 36)],
    schema: [["hm", ada], async () => same((await ai.generateObject({ ...ask, schema: person })).object.age, 36)],
    thoughts: ["<think>hm</think>fine", async () => {
      const found = await ai.generateText(ask);
      same([found.text, found.reasoningText], ["fine", "hm"]);
    }],
    "roles and parts": ["fine", async () => same((await ai.generateText({
      ...ask, system: "be brief", messages: [{ role: "user", content: [{ type: "text", text: "how is Rome?" }] }],
    })).text, "fine")],
    "several answers": "returns one",
    stop: ["fine STOP more", async () => same((await ai.generateText({ ...ask, stopSequences: ["STOP"] })).text, "fine ")],
    "/v1/completions": ["fine", async () =>
      same((await ai.generateText({ ...ask, messages: undefined, prompt: "a", model: provider.completionModel("m") })).text,
        "fine")],
    "/v1/responses": ["fine", async () =>
      same((await ai.generateText({ ...ask, model: responses("m"), providerOptions: { openai: { store: false } } })).text,
        "fine")],
    "list of models": "has none",
    "too long a prompt": ["fine", async () => {
      try {
        await ai.generateText({ ...ask, messages: [{ role: "user", content: long }] });
      } catch (error) {
        const [outcome] = judged(error);
        same(outcome, "refused");
        return error.constructor.name;
      }
      throw new Error("was answered");
    }],
    embeddings: ["", () => refused(() => ai.embed({ model: provider.textEmbeddingModel("m"), value: "a", maxRetries: 0 }))],
    image: ["", () => refused(() => ai.generateText({
      ...ask, messages: [{ role: "user", content: [{ type: "image", image: dot }] }],
    }))],
  };
}

await run({ openai_node: openaiNode, vercel }[client]());
