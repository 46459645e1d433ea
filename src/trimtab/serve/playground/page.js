() => {
  // A file that is dropped on the pairs, or chosen below them, is read here: it never leaves the browser as a file.
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
}
