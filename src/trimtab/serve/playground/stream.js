(() => {
  // Gradio's results come on one stream, which the server ends when no request is left. A request that is sent while
  // that end is on its way would never get a result: the server has stopped writing, and Gradio believes that the
  // stream is still open. So this script reads the stream first: for Gradio, it ends only when all requests have their
  // results, and otherwise continues with a new stream.
  const ask = window.fetch.bind(window);
  const unanswered = new Set(); // events of Gradio's queue, and placeholders until their ids are known
  const early = new Set(); // events that were answered before their ids were known
  let ending = Promise.resolve();

  const answered = (event) => unanswered.delete(event) || early.add(event);

  async function join(input, init) {
    const unknown = {};
    unanswered.add(unknown);
    try {
      const response = await ask(input, withKey(init));
      const { event_id: event } = response.ok ? await response.clone().json() : {};
      if (event && !early.delete(event)) unanswered.add(event);
      await ending;
      return response;
    } finally {
      unanswered.delete(unknown);
    }
  }

  // Without the key in a header the server only accepts small requests, since it checks the key before the body.
  function withKey(init) {
    const key = document.querySelector("#tt-key input, #tt-key textarea")?.value.trim();
    if (!key || !/^[!-~]+$/.test(key)) return init;
    const headers = new Headers(init?.headers);
    headers.set("Authorization", `Bearer ${key}`);
    return { ...init, headers };
  }

  async function listen(input, init) {
    const request = new Request(input, init);
    const first = await ask(request.clone());
    if (!first.ok || !first.body) return first;
    const writer = new TextEncoder();
    const body = new ReadableStream({
      async start(out) {
        try {
          for (let response = first; response; ) {
            const next = await copy(response.body, (text) => out.enqueue(writer.encode(text)));
            response = next ? await ask(request.clone()) : null;
            if (response && !response.ok) throw new Error(`the stream of answers ended with status ${response.status}`);
          }
          out.close();
        } catch (error) {
          out.error(error);
        }
      },
    });
    return new Response(body, { status: first.status, headers: first.headers });

    // Copies messages until the stream ends; returns whether to continue with another stream.
    async function copy(from, put) {
      const reader = from.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        const messages = (rest + value).split("\n\n");
        rest = messages.pop();
        for (const message of messages) {
          const kind = /^data: *\{"msg": *"(\w+)"/.exec(message)?.[1];
          if (kind === "process_completed") answered(JSON.parse(message.slice("data:".length)).event_id);
          if (kind === "unexpected_error" || kind === "server_stopped") unanswered.clear();
          if (kind === "close_stream") {
            if (unanswered.size) return true;
            ending = ended(request.signal);
          }
          put(message + "\n\n");
        }
      }
      put(rest);
      return false;
    }
  }

  // Gradio aborts a stream as soon as it has read its end.
  const ended = (signal) =>
    new Promise((resolve) => {
      signal.addEventListener("abort", resolve, { once: true });
      setTimeout(resolve, 1000);
    });

  window.fetch = (input, init) => {
    const path = new URL(input.url ?? input, document.baseURI).pathname;
    if (path.endsWith("/queue/join")) return join(input, init);
    if (path.endsWith("/queue/data")) return listen(input, init);
    return ask(input, init);
  };
})();
