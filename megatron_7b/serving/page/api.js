// The server's API, which is OpenAI's: models, and replies as they are written.

const KEY = "megatron-7b.api-key"; // in sessionStorage: it lasts as long as the tab
const FIRST_ANSWER_SECONDS = 300; // a queue may be long

/** What went wrong with a request, of a kind that the page has words for. */
export class ApiError extends Error {
  /**
   * @param {"unreachable"|"key"|"busy"|"tooLong"|"noModel"|"refused"|"failed"|"cut"|"tooSlow"} kind
   * @param {string} detail What the server says, in its own words.
   * @param {number|null} wait Seconds that the server suggests to wait.
   */
  constructor(kind, detail = "", wait = null) {
    super(detail || kind);
    Object.assign(this, { kind, detail, wait });
  }
}

/** A client of the server that this page comes from. */
export class Client {
  /** @param {Storage|null} storage Keeps the API key for the tab. */
  constructor(storage) {
    this.storage = storage;
    this.key = storage?.getItem(KEY) ?? "";
  }

  /** Use an API key; an empty one is forgotten. */
  useKey(key) {
    this.key = key;
    if (key === "") this.storage?.removeItem(KEY);
    else this.storage?.setItem(KEY, key);
  }

  /** Return the models that can chat: [{id, parent}], adapters with the model that they belong to. */
  async models() {
    const { data } = await (await this.request("v1/models")).json();
    if (!Array.isArray(data)) throw new ApiError("failed", "no list of models");
    const chats = (model) => !Array.isArray(model.endpoints) || model.endpoints.includes("/v1/chat/completions");
    const usable = data.filter((model) => typeof model?.id === "string" && chats(model));
    return usable.map(({ id, parent }) => ({ id, parent: typeof parent === "string" && parent !== id ? parent : null }));
  }

  /** Tell whether the server is up. */
  async isUp() {
    try {
      return (await fetch("health", { cache: "no-store" })).ok;
    } catch {
      return false;
    }
  }

  /**
   * Have a model reply.
   *
   * @param {{model: string, messages: Array<Object>}} body With any other options of the API.
   * @param {AbortSignal} signal Ends the request, on the server too.
   * @yields {{text: string}|{tokens: number}|{end: string}} Pieces of the reply, its length, and why it ended.
   * @throws {ApiError}
   */
  async *reply(body, signal) {
    const asked = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await this.request("v1/chat/completions", asked, signal);
    let ended = false;
    for await (const data of events(response.body, signal)) {
      if (data === "[DONE]") return;
      const chunk = parsed(data);
      if (chunk.error) throw errorOf(chunk.error.code === 429 ? 429 : 500, chunk.error, null);
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) yield { text: choice.delta.content };
      if (choice?.finish_reason) {
        ended = true;
        yield { end: choice.finish_reason };
      }
      if (chunk.usage) yield { tokens: chunk.usage.completion_tokens };
    }
    if (!ended) throw new ApiError("cut");
  }

  async request(path, body = null, signal = null) {
    const late = new AbortController();
    const timer = setTimeout(() => late.abort(), FIRST_ANSWER_SECONDS * 1_000);
    const options = { headers: {}, cache: "no-store", signal: AbortSignal.any([late.signal, ...(signal ? [signal] : [])]) };
    if (this.key !== "") options.headers.Authorization = `Bearer ${this.key}`;
    if (body !== null) {
      Object.assign(options, { method: "POST", body: JSON.stringify(body) });
      options.headers["Content-Type"] = "application/json";
    }
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ApiError(late.signal.aborted ? "tooSlow" : "unreachable");
    } finally {
      clearTimeout(timer);
    }
    if (response.ok) return response;
    const said = parsed(await response.text().catch(() => ""));
    throw errorOf(response.status, said.error ?? said, response.headers.get("Retry-After"));
  }
}

function parsed(text) {
  try {
    return JSON.parse(text) ?? {};
  } catch {
    return {};
  }
}

function errorOf(status, said, retryAfter) {
  const detail = typeof said?.message === "string" ? said.message : typeof said?.detail === "string" ? said.detail : "";
  const wait = Number.parseInt(retryAfter, 10);
  return new ApiError(kindOf(status, said?.code, detail), detail, Number.isFinite(wait) ? wait : null);
}

function kindOf(status, code, detail) {
  if (status === 401 || status === 403) return "key";
  if (status === 429) return "busy";
  if (code === "context_length_exceeded" || (status === 400 && /context length|context_length|too long/i.test(detail))) return "tooLong";
  if (status === 404 && (code === "model_not_found" || /model/i.test(detail))) return "noModel";
  if (status === 502 || status === 504) return "unreachable"; // of a proxy whose server is down
  return status < 500 ? "refused" : "failed";
}

/**
 * Return the data of server-sent events.
 *
 * @param {ReadableStream<Uint8Array>} stream
 * @param {AbortSignal} signal
 * @yields {string}
 * @throws {ApiError} Of kind `cut`, if the connection is lost.
 */
export async function* events(stream, signal) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    while (true) {
      const { done, value } = await read(reader, signal);
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const ended of lines) {
        const line = ended.endsWith("\r") ? ended.slice(0, -1) : ended;
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("cut");
  }
}
