// What test_node_client.py asserts on, as JSON on standard output. Argument: the base URL.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "tiny-mixtral";
const messages = [{ role: "user", content: "What does a cow say?" }];
const found = {};

async function failure(call) {
  try {
    await call();
  } catch (error) {
    return error;
  }
  throw new Error("the call succeeded");
}

found.models = (await client.models.list()).data.map((each) => each.id);
const missing = await failure(() => client.models.retrieve("nobody"));
found.missing = [missing.status, missing.constructor.name];

const story = { model, prompt: "Once upon a time", max_tokens: 20, temperature: 0 };
const completion = await client.completions.create(story);
found.completion = completion.choices[0].text;
found.tokens = completion.usage.completion_tokens;
found.streamedCompletion = "";
for await (const chunk of await client.completions.create({ ...story, stream: true })) {
  found.streamedCompletion += chunk.choices[0].text;
}

const question = { model, messages, max_tokens: 40, temperature: 0 };
const chat = await client.chat.completions.create(question);
found.chat = chat.choices[0].message.content;
found.usage = chat.usage.total_tokens;
found.streamedChat = "";
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ ...question, ...options })) {
  found.streamedChat += chunk.choices[0]?.delta.content ?? "";
  found.streamedUsage = chunk.usage?.total_tokens;
}
const response = await client.responses.create({
  model, input: messages[0].content, max_output_tokens: 40, temperature: 0,
});
found.response = response.output_text;

const schema = { type: "object", properties: { animal: { enum: ["cow"] } }, required: ["animal"], additionalProperties: false };
const form = await client.chat.completions.create({
  ...question, max_tokens: 400, response_format: { type: "json_schema", json_schema: { name: "animal", schema } },
});
found.form = form.choices[0].message.content;

const invalid = await failure(() => client.chat.completions.create({ ...question, temperature: 9 }));
found.invalid = [invalid.status, invalid.constructor.name, invalid.param];

const endless = await client.completions.create({ ...story, max_tokens: 480, ignore_eos: true, stream: true });
let numChunks = 0;
for await (const _ of endless) {
  if (++numChunks === 3) break; // the client then aborts the request
}
found.aborted = endless.controller.signal.aborted;

console.log(JSON.stringify(found));
