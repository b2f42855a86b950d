// Vercel's AI SDK against the server at argv[2]: plain, streamed, an object, an error.
import assert from 'node:assert'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { APICallError, generateObject, generateText, streamText } from 'ai'
import { z } from 'zod'

const synthia = createOpenAICompatible({
  name: 'synthia',
  baseURL: process.argv[2],
  apiKey: 'none',
  includeUsage: true,
  supportsStructuredOutputs: true,
})
const model = synthia('synthia-demo')
const prompt = 'What is the difference between an Orca, Dolphin and a Seal?'

const plain = await generateText({ model, prompt, temperature: 0 })
assert(plain.text.length > 0)
assert(plain.usage.outputTokens > 0)
assert.equal(plain.finishReason, 'stop')

let streamed = ''
for await (const part of streamText({ model, prompt, temperature: 0 }).textStream) streamed += part
assert.equal(streamed, plain.text)

const turns = [{ role: 'user', content: prompt }, ...plain.response.messages, { role: 'user', content: 'And a shark?' }]
assert((await generateText({ model, messages: turns })).text.length > 0)

const schema = z.object({ kind: z.enum(['cat', 'dog']), tame: z.boolean() })
const { object } = await generateObject({ model, schema, prompt: 'A cat?' })
schema.parse(object)

await assert.rejects(
  generateText({ model: synthia('nobody'), prompt, maxRetries: 0 }),
  (error) => APICallError.isInstance(error) && error.statusCode === 404 && error.message.includes('synthia-demo'),
)
console.log(plain.text)
