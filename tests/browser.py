# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium, driven through its DevTools protocol over a pipe, which needs no library and no port."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


class Page:
    """A tab. What it writes to the console, and the errors that it raises, are in `messages`."""

    def __init__(self, commands: int, answers: int) -> None:
        self.messages: list[str] = []
        self._commands, self._answers = commands, os.fdopen(answers, 'rb')
        self._number = 0
        self._session: str | None = None
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')

    def call(self, method: str, **params: Any) -> dict:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        number = self._number
        command = dict(id=number, method=method, params=params)
        if self._session:
            command['sessionId'] = self._session
        os.write(self._commands, json.dumps(command).encode() + b'\0')
        while True:
            answer = self._read()
            if answer.get('id') == number:
                assert 'error' not in answer, answer
                return answer['result']

    def open(self, address: str, width: int = 1200, height: int = 800) -> None:
        """Load a page, and wait until it has loaded."""
        self.resize(width, height)
        self.call('Page.navigate', url=address)
        while self._read().get('method') != 'Page.loadEventFired':
            pass

    def resize(self, width: int, height: int, mobile: bool = False) -> None:
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def theme(self, name: str) -> None:
        """Prefer `dark` or `light`."""
        self.call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=name)])

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self.call('Runtime.evaluate', expression=script, returnByValue=True)
        assert 'exceptionDetails' not in result, result
        return result['result'].get('value')

    def move_mouse(self, x: float, y: float) -> None:
        self.call('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)

    def click(self, selector: str) -> None:
        element = f'document.querySelector({selector!r})'
        self.evaluate(f'{element}.scrollIntoView({{block: "center"}})')
        x, y = self.evaluate(f'(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())')
        for kind in ('mousePressed', 'mouseReleased'):
            self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

    def drag_finger(self, *points: tuple[float, float]) -> None:
        kinds = ['touchStart', *['touchMove'] * (len(points) - 1)]
        for kind, (x, y) in zip(kinds, points, strict=True):
            self.call('Input.dispatchTouchEvent', type=kind, touchPoints=[dict(x=x, y=y)])
        self.call('Input.dispatchTouchEvent', type='touchEnd', touchPoints=[])

    def press(self, key: str, modifiers: int = 0) -> None:
        text = dict(text=key) if len(key) == 1 else {}
        self.call('Input.dispatchKeyEvent', type='keyDown', key=key, modifiers=modifiers, **text)
        self.call('Input.dispatchKeyEvent', type='keyUp', key=key, modifiers=modifiers)

    def screenshot(self, path: Path | None = None) -> bytes:
        image = base64.b64decode(self.call('Page.captureScreenshot')['data'])
        if path is not None:
            path.write_bytes(image)
        return image

    def _read(self) -> dict:
        message = bytearray()
        while (byte := self._answers.read(1)) != b'\0':
            assert byte, 'Chromium has ended'
            message += byte
        answer = json.loads(message)
        params = answer.get('params', {})
        if answer.get('method') == 'Runtime.exceptionThrown':
            self.messages.append(str(params['exceptionDetails']))
        elif answer.get('method') == 'Runtime.consoleAPICalled':
            self.messages.append(str(params['args']))
        elif answer.get('method') == 'Log.entryAdded':
            self.messages.append(str(params['entry']))
        elif answer.get('method') == 'Network.requestWillBeSent' and params['request']['url'].startswith('http'):
            self.messages.append('request of ' + params['request']['url'])
        return answer


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Start Chromium with a profile in a folder, and yield a tab."""
    assert CHROMIUM is not None
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    # Chromium reads from its file 3 and writes to 4.
    redirect = f'exec 3<&{command_read} 4>&{answer_write}; exec "$@"'
    options = ['--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-pipe', f'--user-data-dir={folder}']
    with subprocess.Popen(
        ['bash', '-c', redirect, 'bash', CHROMIUM, *options, 'about:blank'],
        pass_fds=[command_read, answer_write], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        os.close(command_read)
        os.close(answer_write)
        try:
            yield Page(command_write, answer_read)
        finally:
            process.terminate()
            os.close(command_write)
