// Requests to the server, its streams, and its errors as one line.

/** What the server, or the way to it, has refused; `message` is one line for the reader. */
export class ServerError extends Error {
  constructor(message, status = 0, param = null) {
    super(message.replace(/\s+/g, " "));
    this.status = status; // of HTTP, 0 where no answer came
    this.param = param; // field of the request that is at fault, if the server names one
  }
}

/** Fetch a path; with a `body`, post it as JSON. Raises ServerError for what is not a success. */
export async function request(path, { key = "", body = null, signal = null } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
  if (body) options.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw lost(error, `No answer from ${location.host}. Is the server running?`);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

function lost(error, line) {
  return error.name === "AbortError" ? error : new ServerError(line);
}

async function refusal(response) {
  const { status } = response;
  let error = null;
  try {
    ({ error } = await response.json());
  } catch {
    // Not our server's form: a proxy's page, say. The status is all there is to tell.
  }
  const said = typeof error === "string" ? error : error?.message; // vLLM's 401 is a string
  return new ServerError(said || `The server answered ${status} without a reason.`, status, error?.param);
}

/** Yield the pieces of a response's body as they come. */
export async function* pieces(response) {
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (error) {
    throw lost(error, "The connection broke before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {}); // of a stream that has failed, it rejects with the same error
  }
}

/** Yield the JSON of each server-sent event, until [DONE]. */
export async function* events(response) {
  const decoder = new TextDecoder();
  let buffered = "";
  for await (const piece of pieces(response)) {
    buffered += decoder.decode(piece, { stream: true });
    const lines = buffered.split(/\r?\n/);
    buffered = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message, event.error.code);
      yield event;
    }
  }
  throw new ServerError("The connection ended before the answer was complete.");
}
