// A text field with suggestions (the combobox pattern of ARIA): arrow keys, Enter and Escape, or the mouse.
import { html, useEffect, useRef, useState } from "./ui.js";

const WAIT = 150; // milliseconds after a key before suggestions are read

/**
 * label, id: of the field. read(text): Promise of [{value, text}]. take(value): a suggestion or the typed text
 * was chosen. keep: whether the field keeps the chosen value.
 */
export function Suggest({ label, id, read, take, keep, placeholder }) {
  const [text, setText] = useState("");
  const [options, setOptions] = useState([]);
  const [active, setActive] = useState(-1);
  const [open, setOpen] = useState(false);
  const latest = useRef(0);

  useEffect(() => {
    const number = ++latest.current;
    if (!open || !text.trim()) {
      setOptions([]);
      return undefined;
    }
    const timer = setTimeout(() => read(text.trim()).then(
      (found) => { if (latest.current === number) { setOptions(found); setActive(-1); } },
      () => {},
    ), WAIT);
    return () => clearTimeout(timer);
  }, [text, open]);

  const choose = (value) => {
    setOpen(false);
    setText(keep ? value : "");
    take(value);
  };
  const pressed = (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      const step = event.key === "ArrowDown" ? 1 : -1;
      if (options.length) setActive((active + step + options.length + (active < 0 && step < 0)) % options.length);
      else setOpen(true);
    } else if (event.key === "Enter") {
      event.preventDefault();
      if (active >= 0 && options[active]) choose(options[active].value);
      else if (text.trim()) choose(text.trim());
    } else if (event.key === "Escape") {
      setOpen(false);
    }
  };
  const shown = open && options.length > 0;
  return html`<div class="suggest">
    <label for=${id}>${label}</label>
    <input id=${id} role="combobox" autocomplete="off" spellcheck=${false} aria-autocomplete="list"
      aria-expanded=${shown} aria-controls="${id}-list" placeholder=${placeholder}
      aria-activedescendant=${shown && active >= 0 ? `${id}-${active}` : null} value=${text}
      onInput=${(event) => { setText(event.target.value); setOpen(true); }}
      onKeyDown=${pressed} onBlur=${() => setOpen(false)}/>
    <ul id="${id}-list" role="listbox" aria-label=${label} hidden=${!shown}>
      ${options.map((option, place) => html`<li key=${option.value} id="${id}-${place}" role="option"
        aria-selected=${place === active}
        onMouseDown=${(event) => { event.preventDefault(); choose(option.value); }}>
        <span>${option.text}</span>${option.text !== option.value && html`<span class="soft">${option.value}</span>`}
      </li>`)}
    </ul>
  </div>`;
}
