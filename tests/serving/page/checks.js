// What tests look at in the page. tests/serving/test_page.py puts it into a tab as `checks`.

window.checks = {
  /** What models' texts became: tags, handlers, links, and how deep they are. */
  drawn() {
    const all = [...document.querySelectorAll("#thread .markdown *")];
    const depth = (one) => (one.parentElement === null ? 0 : 1 + depth(one.parentElement));
    return {
      tags: [...new Set(all.map((one) => one.tagName))],
      handlers: all.filter((one) => [...one.attributes].some(({ name }) => /^on|^style$/.test(name))).length,
      links: all.filter((one) => one.tagName === "A").map(({ hostname, rel, target }) => [hostname, rel, target]),
      deepest: Math.max(...all.map(depth)),
    };
  },

  /** Where a text that grows is drawn otherwise than at once. */
  async growing(text) {
    const { MarkdownView } = await import("/static/markdown_view.js");
    const different = [];
    for (const step of [1, 3, 7]) {
      const growing = new MarkdownView(document.createElement("div"));
      for (let end = step; end <= text.length; end += step) {
        const whole = new MarkdownView(document.createElement("div"));
        growing.update(text.slice(0, end));
        whole.update(text.slice(0, end));
        const [one, other] = [growing.element.innerHTML, whole.element.innerHTML];
        if (one !== other) different.push([step, end, one, other]);
      }
    }
    return different;
  },

  /** Keep the longest time for which the page did nothing for others, in milliseconds. */
  watchPauses() {
    let last = performance.now();
    checks.longest = 0;
    const tick = () => {
      const now = performance.now();
      checks.longest = Math.max(checks.longest, now - last);
      last = now;
      setTimeout(tick, 5);
    };
    tick();
  },

  /** Keep what screen readers are told. */
  watchAnnouncements() {
    const announcer = document.getElementById("announcer");
    checks.said = [];
    new MutationObserver(() => checks.said.push(announcer.textContent)).observe(announcer, { childList: true });
  },

  /** Texts whose contrast with what is behind them is less than WCAG's 4.5. */
  faint() {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const luminance = (colour) => {
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      const linear = (value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
      const [red, green, blue] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => linear(value / 255));
      return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const background = (one) => {
      const { backgroundColor } = getComputedStyle(one);
      return backgroundColor === "rgba(0, 0, 0, 0)" ? background(one.parentElement) : backgroundColor;
    };
    const contrast = (one) => {
      const [dark, light] = [luminance(getComputedStyle(one).color), luminance(background(one))].sort((a, b) => a - b);
      return (light + 0.05) / (dark + 0.05);
    };
    const hasText = (one) => [...one.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim() !== "");
    const shown = { opacityProperty: true, visibilityProperty: true };
    return [...document.querySelectorAll("body *")]
      .filter((one) => hasText(one) && one.checkVisibility(shown) && one.closest(".unseen, :disabled, .skip") === null)
      .map((one) => [contrast(one), one.className || one.tagName])
      .filter(([ratio]) => ratio < 4.5);
  },
};
