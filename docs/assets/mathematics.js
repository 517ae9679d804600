// Renders what pymdownx.arithmatex (generic) marks up, on the first page and after every instant navigation.
document$.subscribe(() => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const text = element.textContent.trim();
    if (!/^\\[(\[]/.test(text)) continue;
    katex.render(text.slice(2, -2), element, { displayMode: text.startsWith("\\["), throwOnError: false });
  }
});
