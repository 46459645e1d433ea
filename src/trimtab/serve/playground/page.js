() => {
  // A file that is dropped on the pairs, or chosen below them, is read here: only its text leaves the browser.
  const put = (area, text) => {
    Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value").set.call(area, text);
    area.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const pairs = () => document.querySelector("#tt-pairs textarea");
  const read = async (file) => {
    const name = document.querySelector("#tt-name textarea, #tt-name input");
    put(pairs(), await file.text());
    if (name && !name.value) {
      const stem = file.name.replace(/\.[^.]*$/, "").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "");
      const own = name instanceof HTMLTextAreaElement ? HTMLTextAreaElement : HTMLInputElement;
      Object.getOwnPropertyDescriptor(own.prototype, "value").set.call(name, stem.slice(0, 64));
      name.dispatchEvent(new Event("input", { bubbles: true }));
    }
  };
  const onPairs = (event) => event.target.closest && event.target.closest("#tt-pairs") && event.dataTransfer;
  document.addEventListener("dragover", (event) => {
    if (onPairs(event)) event.preventDefault();
  }, true);
  document.addEventListener("drop", (event) => {
    if (!onPairs(event) || !event.dataTransfer.files.length) return;
    event.preventDefault();
    event.stopPropagation();
    read(event.dataTransfer.files[0]);
  }, true);
  document.addEventListener("change", (event) => {
    if (event.target.id === "tt-file" && event.target.files.length) read(event.target.files[0]);
  });

  // Screen readers announce an answer once it is complete: streamed text would be announced again at every token. The
  // root's attributes give the page's state, for the styles: whether there is a turn yet, and whether it is answering.
  const teller = document.createElement("div");
  teller.id = "tt-teller";
  teller.setAttribute("role", "log");
  teller.setAttribute("aria-live", "polite");
  teller.setAttribute("aria-label", "Answers");
  (document.querySelector("main") ?? document.body).append(teller);
  const told = new Set();
  const look = () => {
    waiting = false;
    for (const answer of document.querySelectorAll(".tt-answer[aria-busy=false]")) {
      if (!answer.dataset.number || told.has(answer.dataset.number)) continue;
      told.add(answer.dataset.number);
      const line = document.createElement("p");
      const parts = [answer.querySelector("h3"), answer.querySelector(".tt-text, .tt-error")];
      line.textContent = parts.map((part) => part?.innerText.trim() ?? "").join(": ");
      teller.append(line);
      while (teller.childElementCount > 20) teller.firstElementChild.remove();
    }
    const root = document.documentElement;
    const focused = document.activeElement;
    const said = root.toggleAttribute("data-tt-said", document.querySelector("#tt-talk .tt-turn") !== null);
    const busy = root.toggleAttribute("data-tt-busy", document.querySelector("#tt-talk [aria-busy=true]") !== null);
    // if the focused element is hidden now, focus the message box
    if ((said && focused?.closest("#tt-examples")) || (!busy && focused?.id === "tt-stop")) {
      document.querySelector("#tt-message textarea")?.focus();
    }
  };
  let waiting = false;
  new MutationObserver(() => {
    if (waiting) return;
    waiting = true;
    setTimeout(look, 100);
  }).observe(document.body, { childList: true, subtree: true });

  // Gradio's lists stay open when they lose focus: Escape closes them.
  document.addEventListener("focusout", ({ target }) => {
    if (!target.matches?.("input[role=combobox]")) return;
    setTimeout(() => {
      if (document.activeElement === target || target.getAttribute("aria-expanded") !== "true") return;
      target.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
    }, 150);
  });
}
