# An image that serves a model: the inference side alone, no torch, not root.
#   docker build -t distcls .
#   docker run -p 8000:8000 -v "$PWD/runs/photos:/model:ro" distcls
FROM python:3.12-slim AS build
RUN python -m venv /opt/distcls
COPY . /src
RUN /opt/distcls/bin/pip install --no-cache-dir "/src[serve]"

FROM python:3.12-slim
COPY --from=build /opt/distcls /opt/distcls
ENV PATH=/opt/distcls/bin:/usr/local/bin:/usr/bin:/bin PYTHONUNBUFFERED=1 DISTCLS_CACHE=/tmp/distcls
# that of ONNX Runtime 1.32 is on by default, and wants to write into the home folder
ENV ORT_DISABLE_TELEMETRY=1
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
# as a list, so that the server itself is the first process and gets SIGTERM
ENTRYPOINT ["distcls", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--model", "/model"]
