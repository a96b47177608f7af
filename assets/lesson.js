// The lesson moves the page's own controls, remembers what the visitor had set, and can fill the
// window like a slide. What it shows comes from the server (mlpmoe/explorer/tabs/lesson.py).
(() => {
  const WAIT = 300; // milliseconds that a control has to rest before the page follows
  const LATE = 15000; // milliseconds after which something must have gone wrong
  const SLIDE = { width: 1280, height: 720 }; // pixels that a slide is laid out in, then scaled
  const KEPT = "mlpmoe-lesson"; // sessionStorage: what the visitor had set, what the lesson set last

  let began = false; // whether somebody did something in the lesson: opening the tab moves nothing
  let step = "cut"; // key
  let waiting = null;

  const find = (selector) => document.querySelector(selector);
  const field = (id) => find(`#${id} textarea, #${id} input`)?.value ?? "";
  const shown = (element) => Boolean(element?.checkVisibility());
  const presenting = () => document.body.classList.contains("lesson-present");

  // A link's settings are a model and a spec, on texts of the visitor's choice.
  const TEXTS = ["text", "calibration"];
  const settings = (query) =>
    query.split("&").filter((part) => !TEXTS.includes(part.split("=")[0])).join("&");
  const texts = (query) =>
    query.split("&").filter((part) => TEXTS.includes(part.split("=")[0]));

  let kept = { mine: "", last: "" };
  try {
    kept = { ...kept, ...JSON.parse(sessionStorage.getItem(KEPT) ?? "{}") };
  } catch {} // begins anew
  const keep = (values) => {
    kept = { ...kept, ...values };
    document.body.classList.toggle("lesson-moved", Boolean(kept.mine));
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(kept));
    } catch {} // this browser keeps nothing
  };

  // The tab was opened: what is set now is the visitor's, unless the lesson itself has set it.
  const begin = () => {
    began = presenting();
    keep(settings(field("query")) === kept.last ? {} : { mine: "", last: "" });
    resize();
  };

  // While the page is about to follow, what it says is about other settings than the step.
  let following = null;
  const follows = (is) => {
    clearTimeout(following);
    document.body.classList.toggle("lesson-follows", is);
    if (is) following = setTimeout(() => follows(false), LATE);
  };

  // plan: settings for the page's controls, which follow a little later.
  const move = (plan) => {
    clearTimeout(waiting);
    if (!plan || !began) return;
    follows(settings(field("query")) !== plan);
    waiting = setTimeout(() => {
      const now = field("query");
      if (!now || !shown(find("#lesson"))) return;
      keep({ mine: kept.mine || now, last: plan });
      if (settings(now) === plan) return;
      const measured = texts(now);
      const calibrated = measured.length > 1 ? [] : texts(kept.mine).slice(1);
      mlpmoe.send("taken", `${[plan, ...measured, ...calibrated].join("&")} ${Date.now()}`);
    }, WAIT);
  };
  const planned = (key) => key === step && move(field(`lesson-${key}-plan`));

  const back = () => {
    clearTimeout(waiting);
    follows(false);
    const { mine } = kept;
    keep({ mine: "", last: "" });
    if (mine) mlpmoe.send("taken", `${mine} ${Date.now()}`);
    if (shown(find("#lesson .lesson-where h2"))) focusStep();
  };

  // What the page says of its settings; which other ones do better is told apart.
  const whole = (html) => {
    if (settings(field("query")) === kept.last) follows(false);
    const words = new DOMParser().parseFromString(html ?? "", "text/html").body.textContent.trim();
    const [, first, rest] = words.match(/^(.*?\.)\s+([A-Z].*)$/s) ?? [null, words, ""];
    const said = document.createElement("p");
    said.append(first);
    if (rest) {
      const others = Object.assign(document.createElement("span"), { textContent: ` ${rest}` });
      others.className = "lesson-others";
      said.append(others);
    }
    return said.outerHTML;
  };

  // Plots fit into the place that they have got, also those that are about to come.
  const resize = () => {
    for (const wait of [60, 500]) setTimeout(() => dispatchEvent(new Event("resize")), wait);
  };
  const fit = () => {
    if (!presenting()) return;
    const scale = Math.min(innerWidth / SLIDE.width, innerHeight / SLIDE.height);
    const style = document.body.style;
    style.setProperty("--lesson-scale", scale);
    style.setProperty("--lesson-left", `${(innerWidth - scale * SLIDE.width) / 2}px`);
    style.setProperty("--lesson-top", `${(innerHeight - scale * SLIDE.height) / 2}px`);
  };
  addEventListener("resize", fit);

  // To the heading of the step: there reading goes on, also by keyboard.
  const focusStep = () => {
    const here = [...document.querySelectorAll("#lesson .lesson-where h2")].find(shown);
    if (!here) return;
    here.tabIndex = -1;
    here.focus({ preventScroll: true });
    if (!presenting()) find("#lesson").scrollIntoView({ block: "start" });
  };
  const arrive = (key) => {
    step = key;
    document.body.dataset.lessonStep = key;
    document.body.classList.remove("lesson-asking");
    resize();
    if (!began) return;
    setTimeout(focusStep, 60);
    planned(key);
  };

  const look = (what) => {
    document.body.dataset.lessonLook = what;
    resize();
    return what;
  };
  const ask = () => {
    const asking = document.body.classList.toggle("lesson-asking");
    if (asking) [...document.querySelectorAll("#lesson .lesson-asks input")].find(shown)?.focus();
  };

  // Shows nothing but the lesson, or the whole page again, and tells the server which.
  const present = () => {
    const large = document.body.classList.toggle("lesson-present");
    const button = find("#lesson-present");
    document.body.classList.remove("lesson-asking");
    button.setAttribute("aria-pressed", large);
    button.focus({ preventScroll: true });
    fit();
    resize();
    if (large) {
      began = true;
      planned(step);
      scrollTo(0, 0);
    } else setTimeout(() => button.scrollIntoView({ block: "center" }), 60);
    return large;
  };

  // Esc goes back to the step, then to the page; a clicker turns the pages.
  const TURNS = { PageDown: ".lesson-next", PageUp: ".lesson-previous" };
  addEventListener("keydown", (event) => {
    if (!presenting() || event.defaultPrevented) return;
    if (event.key === "Escape") {
      if (document.body.classList.contains("lesson-asking")) ask();
      else find("#lesson-present").click();
    } else if (TURNS[event.key]) {
      event.preventDefault();
      [...document.querySelectorAll(TURNS[event.key])].find(shown)?.click();
    }
  });
  for (const kind of ["pointerdown", "keydown"]) {
    document.addEventListener(kind, (event) => {
      if (event.isTrusted && event.target.closest?.("#lesson-steps")) began = true;
    }, true);
  }

  mlpmoe.lesson = { begin, move, planned, back, whole, arrive, look, ask, present };
})();
