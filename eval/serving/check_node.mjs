// Log-likelihoods of a prompt and a greedy continuation by node-llama-cpp's prebuilt llama.cpp, as
// JSON: node check_node.mjs MODEL.gguf SHORT NEW ID ...; `node.sh` runs it. SHORT: tokens of the prompt
// that are continued by NEW others.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const from = createRequire(process.cwd() + "/");
const {getLlama} = await import(pathToFileURL(from.resolve("node-llama-cpp")));
const [file, few, more, ...ids] = process.argv.slice(2).map((a, i) => (i ? Number(a) : a));

const llama = await getLlama({gpu: false, build: "never", maxThreads: 1, logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const options = {
    contextSize: 512, flashAttention: false, experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32",
};

let context = await model.createContext(options);
const asked = ids.map((id) => [id, {generateNext: {probabilities: true}}]);
const found = await context.getSequence().controlledEvaluate(asked);
const logprobs = ids.slice(1).map((id, i) => Math.log(found[i].next.probabilities.get(id)));
await context.dispose();

context = await model.createContext(options);
const greedy = [];
for await (const token of context.getSequence().evaluate(ids.slice(0, few), {temperature: 0})) {
    greedy.push(token);
    if (greedy.length === more) break;
}
console.log(JSON.stringify({logprobs, greedy}));
process.exit(0);
